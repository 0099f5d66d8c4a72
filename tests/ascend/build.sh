#!/bin/sh
# Builds the stand-in for CANN and torch_npu.
#
# usage: build.sh INCLUDE FOLDER      (headers of libtorch, folder for the library)
set -eu
here=$(dirname "$0")
include=$1 folder=$2
mkdir -p "$folder"
# One file at a time: each compilation takes about 1.5 GB.
for name in acl hccl torch_npu; do
    c++ -std=c++20 -O1 -fPIC -w -I"$here/../../torch-ext/cpp/gloo-forward" -I"$include" \
        -I"$include/torch/csrc/api/include" -c "$here/$name.cpp" -o "$folder/$name.o"
done
# libtorch's symbols come from the program that loads the library.
c++ -shared -o "$folder/libnpu.so" "$folder/acl.o" "$folder/hccl.o" "$folder/torch_npu.o" -lpthread
for name in libascendcl.so libhccl.so libtorch_npu.so; do ln -sf libnpu.so "$folder/$name"; done
