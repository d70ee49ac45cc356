// A second translation unit with every header in it: a definition that is not inline breaks the link.
#include "consumer.hpp"

#include <string_view>

#if defined(CONSUMER_FOUND)
static_assert(std::string_view(cca::version_string) == CONSUMER_FOUND, "the package states another version");
static_assert(std::string_view(CCA_VERSION_STRING) == CONSUMER_FOUND, "the package states another version");
#endif

std::vector<float> second_attend_to_itself(const std::vector<float>& tokens) { return attend_to_itself(tokens); }
