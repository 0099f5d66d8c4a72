// Types and functions that the kernels share. They are compiled for one dtype at a time: NUMBER is
// float or bf16. All arithmetic is in fp32. VECTOR is the number of elements that a thread reads
// and writes at once: 16 bytes if all rows are aligned to them, else one element.

struct alignas(2) bf16 {
    unsigned short bits;
};

typedef NUMBER Number;
typedef long long Long;

#ifndef KERNEL
#define KERNEL extern "C" __global__
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define STATIC_SHARED(type, name, count) __shared__ type name[count]
// The emulator checks what a GPU only traps on.
#define ASSERT_ALIGNED(address, bytes)
#endif

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// Rounds to nearest, ties to even.
template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) {
    bf16 result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    // One instruction; the upper half of the pair is not used.
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
    result.bits = pair;
#else
    unsigned bits = __float_as_uint(x);
    bool number = (bits & 0x7fffffff) <= 0x7f800000;
    result.bits = number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
#endif
    return result;
}

// Elements that a thread reads and writes at once.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
    T x[V];
};
typedef Pack<Number, VECTOR> Numbers;

template <int V = VECTOR, class T> __device__ __forceinline__ Pack<T, V> load(const T* x) {
    ASSERT_ALIGNED(x, sizeof(T) * V);
    return *reinterpret_cast<const Pack<T, V>*>(x);
}
template <int V = VECTOR, class T>
__device__ __forceinline__ void store(T* x, const Pack<T, V>& pack) {
    ASSERT_ALIGNED(x, sizeof(T) * V);
    *reinterpret_cast<Pack<T, V>*>(x) = pack;
}

// A block has blockDim.y rows of blockDim.x threads each. A thread starts at matrix row
// `first_row` and advances by `grid_row_stride`.
__device__ __forceinline__ Long first_row() { return Long(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ Long grid_row_stride() { return Long(gridDim.x) * blockDim.y; }

// Returns the sum of `x` over the blockDim.x threads of a row, with the same bits on each of them.
// A row is one warp, or several warps that are the whole block. `shared` holds 32 elements.
__device__ __forceinline__ float row_sum(float x, float* shared) {
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(~0u, x, step);
    }
    if (blockDim.x == 32) {
        return x;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) {
        sum += shared[warp];
    }
    return sum;
}
