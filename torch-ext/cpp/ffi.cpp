// All of the ffi as one source: each file by itself would read libtorch's headers again, which takes three times as long.
#include "autograd.cpp"
#include "c10d.cpp"
#include "npu.cpp"
#include "ops.cpp"
#include "stream.cpp"
