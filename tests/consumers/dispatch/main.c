/* The same from C: one token sees itself alone. */
#include <cca/dispatch/cca.h>
#include <stdio.h>

int main(void) {
  float token[] = {1, 2, 3}, answer[3] = {0};
  int64_t shape[] = {1, 1, 1, 3};
  DLTensor in = {token, {kDLCPU, 0}, 4, {kDLFloat, 32, 1}, shape, NULL, 0}, out = in;
  cca_options options = CCA_OPTIONS;
  cca_call call = {.struct_size = sizeof call, .query = &in, .key = &in, .value = &in};
  options.window = 4;
  out.data = answer;
  call.out = &out;
  call.options = &options;
  if (cca_attention(&call) != CCA_OK) puts(cca_error());
  return answer[0] == 1 && answer[1] == 2 && answer[2] == 3 ? 0 : 1;
}
