// The Python module limpet._core; bind_<family>.cpp holds what it has of each family.

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>

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

// glibc raises its limits by itself when a mapped block of at most 32 MB is freed (mallopt(3), M_MMAP_THRESHOLD). The
// block is never written to; volatile, or the compiler would leave both calls out.
void keep_freed_memory() {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));
  std::free(block);
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
