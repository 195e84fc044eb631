// The Python module limpet._core; bind_<family>.cpp holds what it has of each family.

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bind.h"
#include "cpu/isa.h"

namespace limpet {
namespace {

// Only a wish: a system without huge pages keeps its own.
void prefer_huge_pages([[maybe_unused]] Address address, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE)), begin = address / page * page;
  madvise(pointer<void>(begin), static_cast<std::size_t>(address - begin) + static_cast<std::size_t>(bytes),
          MADV_HUGEPAGE);
#endif
}

#if defined(__GLIBC__)
// Whoever set malloc's limits meant them.
bool malloc_is_ours() {
  for (const char* name : {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"})
    if (std::getenv(name)) return false;
  const char* const tunables = std::getenv("GLIBC_TUNABLES");
  return !tunables || !std::strstr(tunables, "glibc.malloc.");
}
#endif

// glibc keeps freed memory up to a limit, and maps blocks of over 32 MB one by one whatever limits are set
// (mallopt(3)).
void keep_freed_memory() {
#if defined(__GLIBC__)
  static const bool done =
      malloc_is_ours() && mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, 1 << 30);
  static_cast<void>(done);
#endif
}

// While some block of code holds this, the large blocks come from the memory that is kept, too.
void hold_large_blocks([[maybe_unused]] bool hold) {
#if defined(__GLIBC__)
  static const bool ours = malloc_is_ours();
  static std::atomic<int> holders{0};
  constexpr int kDefaultMaps = 65536;
  const int before = holders.fetch_add(hold ? 1 : -1);
  if (ours && before == (hold ? 0 : 1)) mallopt(M_MMAP_MAX, hold ? 0 : kDefaultMaps);
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = LIMPET_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = cpu::instruction_sets();
  info["instruction_set"] = cpu::instruction_set();
#if defined(LIMPET_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(LIMPET_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "limpet's compiled core: kernels on raw pointers. Use limpet.ops.";
  cpu::kernels();  // a wrong LIMPET_CPU is an error of the import

  m.def("build_info", build_info);
  m.def("prefer_huge_pages", prefer_huge_pages);
  m.def("keep_freed_memory", keep_freed_memory);
  m.def("hold_large_blocks", hold_large_blocks);

  bind_fisher(m);
  bind_quadratic(m);
  bind_path_integral(m);
  bind_optim(m);
  bind_reservoir(m);
  bind_keyed(m);
  bind_rows(m);
  bind_fisher_plain(m);
  bind_fisher_calls(m);
  bind_gated_lateral(m);
}

}  // namespace limpet
