// A stand-in for libcuda.so.1, NVIDIA's driver, for tests: it refuses what the driver refuses, and
// launches run nothing. STAND_IN_GPUS is the number of GPUs (default 2).
#include <cstdlib>
#include <cstring>
#include <elf.h>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

// Values of CUresult.
enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
};
constexpr int MULTIPROCESSORS = 16;   // A CUdevice_attribute.
constexpr unsigned MAX_THREADS = 1024, MAX_BLOCKS = 0x7fffffff, MAX_SHARED = 48 << 10;

struct Context {
    int device;
};
struct Module {
    Context* context;
    std::set<std::string> kernels;
};
struct Function {
    Module* module;
};
struct Launch {
    unsigned blocks, threads_per_row, rows, shared;
    void* stream;
};

std::mutex lock;
bool initialized = false;
std::map<int, Context> contexts;
thread_local Context* current = nullptr;
thread_local Launch last_launch;

int devices() {
    const char* given = std::getenv("STAND_IN_GPUS");
    return given ? std::atoi(given) : 2;
}

// Returns the names of the kernels in machine code: each has a section `.text.NAME`.
std::set<std::string> kernels_of(const char* image) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    const char* names = image + sections[header->e_shstrndx].sh_offset;
    const std::string prefix = ".text.";
    std::set<std::string> kernels;
    for (int i = 0; i < header->e_shnum; ++i) {
        std::string name = names + sections[i].sh_name;
        if (name.compare(0, prefix.size(), prefix) == 0) {
            kernels.insert(name.substr(prefix.size()));
        }
    }
    return kernels;
}

} // namespace

extern "C" {

int cuInit(unsigned) {
    std::lock_guard<std::mutex> guard(lock);
    initialized = devices() > 0;
    return initialized ? SUCCESS : NO_DEVICE;
}

int cuDeviceGetCount(int* count) {
    *count = devices();
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal < devices() ? SUCCESS : INVALID_DEVICE;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = 132;
    return attribute == MULTIPROCESSORS && device < devices() ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    std::lock_guard<std::mutex> guard(lock);
    contexts[device].device = device;
    *context = &contexts[device];
    return SUCCESS;
}

int cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    current = static_cast<Context*>(context);
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void* image) {
    if (!current) {
        return INVALID_CONTEXT;
    }
    if (std::memcmp(image, ELFMAG, SELFMAG) != 0) {
        return INVALID_IMAGE;
    }
    *module = new Module{current, kernels_of(static_cast<const char*>(image))};
    return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    auto* of = static_cast<Module*>(module);
    *function = new Function{of};
    return of->kernels.count(name) ? SUCCESS : NOT_FOUND;
}

int cuLaunchKernel(
    void* function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads_per_row,
    unsigned rows, unsigned depth, unsigned shared, void* stream, void** arguments, void** extra) {
    if (!current) {
        return INVALID_CONTEXT;
    }
    if (static_cast<Function*>(function)->module->context != current) {
        return INVALID_HANDLE;
    }
    unsigned long threads = 1ul * threads_per_row * rows;
    if (blocks < 1 || blocks > MAX_BLOCKS || blocks_y != 1 || blocks_z != 1 || threads < 1 ||
        threads > MAX_THREADS || depth != 1 || shared > MAX_SHARED || !arguments || extra) {
        return INVALID_VALUE;
    }
    last_launch = {blocks, threads_per_row, rows, shared, stream};
    return SUCCESS;
}

int cuGetErrorString(int code, const char** text) {
    static const std::map<int, const char*> texts = {
        {INVALID_VALUE, "invalid argument"},
        {NOT_INITIALIZED, "initialization error"},
        {NO_DEVICE, "no CUDA-capable device is detected"},
        {INVALID_DEVICE, "invalid device ordinal"},
        {INVALID_IMAGE, "device kernel image is invalid"},
        {INVALID_CONTEXT, "invalid device context"},
        {INVALID_HANDLE, "invalid resource handle"},
        {NOT_FOUND, "named symbol not found"},
    };
    auto found = texts.find(code);
    *text = found == texts.end() ? nullptr : found->second;
    return found == texts.end() ? INVALID_VALUE : SUCCESS;
}

// For tests: returns the last launch of this thread.
Launch stand_in_last_launch() {
    return last_launch;
}
}
