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
// The addresses whose first `prefix` bits are those of `address`.
struct MtxPeerNetwork {
  // An IPv6 address, or an IPv4 address mapped to one.
  uint8_t address[16];
  // Without the bits that map an IPv4 address.
  uint8_t prefix;
};
// Where Gloo listens: on `address`, or if that is empty on `interface`, or if both are empty on the
// address of the host name. The files are empty without encryption. Connections from outside of
// `peers` are dropped, if there are any.
struct MtxGlooDevice {
  const char* address;
  const char* interface;
  const char* key;
  const char* certificate;
  const char* authority;
  const MtxPeerNetwork* peers;
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

// Instructions that accept packets whose source, at `offset`, is in the network.
std::vector<sock_filter> accept_network(int offset, const uint8_t* address, int prefix) {
  std::vector<sock_filter> program;
  std::vector<size_t> comparisons;
  for (int bits = prefix; bits > 0; bits -= 32, offset += 4, address += 4) {
    uint32_t mask = bits >= 32 ? UINT32_MAX : ~(UINT32_MAX >> bits);
    program.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, uint32_t(SKF_NET_OFF + offset)));
    if (mask != UINT32_MAX) program.push_back(BPF_STMT(BPF_ALU | BPF_AND | BPF_K, mask));
    comparisons.push_back(program.size());
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, word(address) & mask, 0, 0));
  }
  program.push_back(BPF_STMT(BPF_RET | BPF_K, UINT32_MAX));
  // What differs is compared with the next network.
  for (size_t at : comparisons) program[at].jf = uint8_t(program.size() - at - 1);
  return program;
}

// A program for the kernel that accepts packets whose source is a peer.
std::vector<sock_filter> peer_filter(int family, const MtxGlooDevice& device) {
  std::vector<sock_filter> program;
  for (size_t i = 0; i < device.num_peers; i++) {
    const MtxPeerNetwork& peer = device.peers[i];
    bool is_v4 = is_mapped_v4(peer.address);
    if (is_v4 != (family == AF_INET)) continue;
    auto accept = is_v4 ? accept_network(12, peer.address + 12, peer.prefix)
                        : accept_network(8, peer.address, peer.prefix);
    program.insert(program.end(), accept.begin(), accept.end());
  }
  program.push_back(BPF_STMT(BPF_RET | BPF_K, 0));
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
        device.num_peers, " networks. Set run.tls, or use a private network");
  }
  return made;
}
} // namespace
