#!/bin/sh
# Builds the stand-in for CANN and torch_npu: build.sh INCLUDE FOLDER, with the headers of libtorch and where the library goes.
set -eu
here=$(dirname "$0")
include=$1 folder=$2
mkdir -p "$folder"
# One file after the other: each takes about 1.5 GB.
for name in acl hccl torch_npu; do
    c++ -std=c++20 -O1 -fPIC -w -I"$here/../../torch-ext/cpp/gloo-forward" -I"$include" \
        -I"$include/torch/csrc/api/include" -c "$here/$name.cpp" -o "$folder/$name.o"
done
# Libtorch's symbols are those of the program that loads it.
c++ -shared -o "$folder/libnpu.so" "$folder/acl.o" "$folder/hccl.o" "$folder/torch_npu.o" -lpthread
for name in libascendcl.so libhccl.so libtorch_npu.so; do ln -sf libnpu.so "$folder/$name"; done
