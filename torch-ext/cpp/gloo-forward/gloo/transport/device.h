// The functions that make a device whose connections are encrypted; see ../context.h. The library
// exports them, and c10d calls them only for environment variables.
#pragma once
#include <sys/socket.h>

#include <memory>
#include <string>

#include "../context.h"

namespace gloo {
namespace transport {
namespace tcp {
struct attr {
  std::string hostname;
  std::string iface;
  int ai_family = AF_UNSPEC;
  int ai_socktype = 0;
  int ai_protocol = 0;
  struct sockaddr_storage ai_addr {};
  int ai_addrlen = 0;
  // In later versions of Gloo.
  int ai_fd = -1;
};
namespace tls {
std::shared_ptr<transport::Device> CreateDevice(
    const struct attr& attr, std::string pkey_file, std::string cert_file, std::string ca_file,
    std::string ca_path);
} // namespace tls
} // namespace tcp
} // namespace transport
} // namespace gloo
