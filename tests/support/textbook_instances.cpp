#define CCA_TEST_INSTANCE template
#include "support.hpp"
