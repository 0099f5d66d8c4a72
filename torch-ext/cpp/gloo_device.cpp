// Gloo's listening sockets: encryption, and which addresses may connect.
#include <dirent.h>
#include <dlfcn.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "ffi.h"

// libtorch 2.11 creates unencrypted connections in a context with encryption: the function that
// connects all ranks calls `tcp::Context::createPair(int, bool)`, which `tls::Context` does not
// override. (It overrides `createPair(int)`, which that function called in earlier versions.) The
// definition here takes the place of libtorch's, because the dynamic linker looks in the program
// first, and chooses by the type of the context.
#define MTX_CREATE_PAIR "_ZN4gloo9transport3tcp7Context10createPairEib"
extern "C" __attribute__((visibility("default"), used)) void* mtx_create_pair(
    void* context, int rank, bool rank_as_number) __asm__(MTX_CREATE_PAIR);

void* mtx_create_pair(void* context, int rank, bool rank_as_number) {
  using Plain = void* (*)(void*, int, bool);
  using Encrypted = void* (*)(void*, int);
  static auto plain = reinterpret_cast<Plain>(dlsym(RTLD_NEXT, MTX_CREATE_PAIR));
  static auto encrypted = reinterpret_cast<Encrypted>(
      dlsym(RTLD_NEXT, "_ZN4gloo9transport3tcp3tls7Context10createPairEi"));
  static auto table =
      static_cast<char*>(dlsym(RTLD_NEXT, "_ZTVN4gloo9transport3tcp3tls7ContextE"));
  // An object points behind the two words that a table of functions begins with.
  bool is_encrypted = *static_cast<char**>(context) == table + 2 * sizeof(void*);
  return is_encrypted ? encrypted(context, rank) : plain(context, rank, rank_as_number);
}

extern "C" {
// Where Gloo listens: on `address`, or if that is empty on `interface`, or if both are empty on the
// address of the host name. The files are empty without encryption. Connections of other addresses
// than `peers` are dropped, if there are any.
struct MtxGlooDevice {
  const char* address;
  const char* interface;
  const char* key;
  const char* certificate;
  const char* authority;
  // 16 bytes each: an IPv6 address, or an IPv4 address mapped to one.
  const uint8_t* peers;
  size_t num_peers;
};
}

namespace {
constexpr size_t kMaxInstructions = 4096;

bool is_mapped_v4(const uint8_t* peer) {
  static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(peer, prefix, 12) == 0;
}

uint32_t word(const uint8_t* bytes) {
  return uint32_t(bytes[0]) << 24 | uint32_t(bytes[1]) << 16 | uint32_t(bytes[2]) << 8 | bytes[3];
}

// A program for the kernel that accepts packets whose source is a peer.
std::vector<sock_filter> peer_filter(int family, const MtxGlooDevice& device) {
  auto load = [](int offset) {
    return sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, uint32_t(SKF_NET_OFF + offset));
  };
  auto equals = [](uint32_t value, uint8_t jump_otherwise) {
    return sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, jump_otherwise);
  };
  const sock_filter accept = BPF_STMT(BPF_RET | BPF_K, UINT32_MAX);
  const sock_filter refuse = BPF_STMT(BPF_RET | BPF_K, 0);
  std::vector<sock_filter> program;
  if (family == AF_INET) program.push_back(load(12));
  for (size_t i = 0; i < device.num_peers; i++) {
    const uint8_t* peer = device.peers + 16 * i;
    if (family == AF_INET && is_mapped_v4(peer)) {
      program.push_back(equals(word(peer + 12), 1));
      program.push_back(accept);
    } else if (family == AF_INET6 && !is_mapped_v4(peer)) {
      for (int part = 0; part < 4; part++) {
        program.push_back(load(8 + 4 * part));
        program.push_back(equals(word(peer + 4 * part), uint8_t(7 - 2 * part)));
      }
      program.push_back(accept);
    }
  }
  program.push_back(refuse);
  return program;
}

// The sockets of this process that listen for connections.
std::set<int> listening_sockets() {
  std::set<int> found;
  DIR* folder = opendir("/proc/self/fd");
  if (!folder) return found;
  while (dirent* entry = readdir(folder)) {
    int fd = std::atoi(entry->d_name);
    int listens = 0;
    socklen_t size = sizeof(listens);
    bool is_socket = getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0;
    if (is_socket && listens) found.insert(fd);
  }
  closedir(folder);
  return found;
}

// Returns false if the socket listens on the network and other addresses can still connect.
bool admit_only_peers(int fd, const MtxGlooDevice& device) {
  int family = 0;
  socklen_t size = sizeof(family);
  if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) != 0) return false;
  if (family != AF_INET && family != AF_INET6) return true;
  auto program = peer_filter(family, device);
  if (program.size() > kMaxInstructions) return false;
  sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};
  // Some sandboxes have no filters. Then the network has to be private.
  return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)) == 0;
}

// Refuses to continue in clear text if libtorch does not call the function above.
void check_encryption() {
  auto ours = reinterpret_cast<void*>(&mtx_create_pair);
  auto has = [](const char* name) { return dlsym(RTLD_NEXT, name) != nullptr; };
  bool is_complete = has("_ZN4gloo9transport3tcp3tls7Context10createPairEi") &&
      has("_ZTVN4gloo9transport3tcp3tls7ContextE") && has(MTX_CREATE_PAIR);
  TORCH_CHECK(
      is_complete && dlsym(RTLD_DEFAULT, MTX_CREATE_PAIR) == ours,
      "this libtorch's Gloo does not encrypt");
}

std::shared_ptr<gloo::transport::Device> listen_anywhere(const MtxGlooDevice& device) {
  using c10d::ProcessGroupGloo;
  if (*device.key) {
    check_encryption();
    gloo::transport::tcp::attr attr;
    attr.hostname = device.address;
    attr.iface = device.interface;
    return gloo::transport::tcp::tls::CreateDevice(
        attr, device.key, device.certificate, device.authority, "");
  }
  if (*device.address) return ProcessGroupGloo::createDeviceForHostname(device.address);
  if (*device.interface) return ProcessGroupGloo::createDeviceForInterface(device.interface);
  return ProcessGroupGloo::createDefaultDevice();
}

std::shared_ptr<gloo::transport::Device> make_device(const MtxGlooDevice& device) {
  // Gloo does not tell its socket, so it is the one that listens afterwards and not before.
  static std::mutex creating;
  std::lock_guard<std::mutex> lock(creating);
  if (!device.num_peers) return listen_anywhere(device);
  auto before = listening_sockets();
  auto made = listen_anywhere(device);
  bool is_open = false;
  for (int fd : listening_sockets()) {
    if (!before.count(fd) && !admit_only_peers(fd, device)) is_open = true;
  }
  if (is_open && !*device.key) {
    TORCH_WARN_ONCE(
        "Gloo's port accepts connections from any address: the kernel takes no filter of ",
        device.num_peers, " addresses. Set run.tls, or use a private network");
  }
  return made;
}
} // namespace
