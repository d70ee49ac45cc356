#pragma once

/// @file
/// Core Context Aware attention for CPUs: far context pooled into core tokens, near context raw, one softmax over both.
/// `reference.hpp`, the textbook in Eigen that the tests measure against, is not included here.

#include "attention.hpp"
#include "call.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "gradient.hpp"
#include "kv_cache.hpp"
#include "merge.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "quantize.hpp"
#include "tensor_view.hpp"
#include "version.hpp"
