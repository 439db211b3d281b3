// Preloaded into a program, kills it before the call given by KILL_AT, counted from 1, of those
// that write, complete, name or remove a file.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

void count_call() {
  static const char* const at = std::getenv("KILL_AT");
  static long calls = 0;
  if (at && ++calls == std::atol(at)) ::kill(::getpid(), SIGKILL);
}

template <class Function>
Function* next(const char* name) {
  count_call();
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

// Reading shares some of them, so it is killed too.
std::size_t fwrite(const void* data, std::size_t size, std::size_t count, std::FILE* file) {
  return next<decltype(fwrite)>("fwrite")(data, size, count, file);
}
int fflush(std::FILE* file) { return next<decltype(fflush)>("fflush")(file); }
int fclose(std::FILE* file) { return next<decltype(fclose)>("fclose")(file); }
int link(const char* from, const char* to) noexcept {
  return next<decltype(link)>("link")(from, to);
}
int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) noexcept {
  return next<decltype(linkat)>("linkat")(from_folder, from, to_folder, to, flags);
}
int rename(const char* from, const char* to) noexcept {
  return next<decltype(rename)>("rename")(from, to);
}
int remove(const char* path) noexcept { return next<decltype(remove)>("remove")(path); }
int unlink(const char* path) noexcept { return next<decltype(unlink)>("unlink")(path); }

int unlinkat(int folder, const char* path, int flags) noexcept {
  return next<decltype(unlinkat)>("unlinkat")(folder, path, flags);
}

}  // extern "C"
