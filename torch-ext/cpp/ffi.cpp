// The only translation unit: compiling each file alone would parse libtorch's headers again, which
// takes three times as long.
#include "autograd.cpp"
#include "c10d.cpp"
#include "custom_store.cpp"
#include "npu.cpp"
#include "ops.cpp"
#include "stream.cpp"
