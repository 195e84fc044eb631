#include "cpu/isa.h"

#include <cstdlib>

#include "check.h"

namespace limpet::cpu {

// Each is defined by the files that CMakeLists.txt compiles once per instruction set.
#define LIMPET_DECLARE(level)           \
  namespace level {                     \
  void fill_quadratic(Kernels&);        \
  void fill_fisher_linear(Kernels&);    \
  void fill_fisher_conv(Kernels&);      \
  void fill_conv_input_grad(Kernels&);  \
  void fill_batch_norm_grads(Kernels&); \
  void fill_fisher_rows(Kernels&);      \
  void fill_fisher_norm(Kernels&);      \
  void fill_path_integral(Kernels&);    \
  void fill_optim(Kernels&);            \
  void fill_reservoir(Kernels&);        \
  void fill_keyed(Kernels&);            \
  void fill_gated_lateral(Kernels&);    \
  static Kernels table() {              \
    Kernels kernels{};                  \
    fill_quadratic(kernels);            \
    fill_fisher_linear(kernels);        \
    fill_fisher_conv(kernels);          \
    fill_conv_input_grad(kernels);      \
    fill_batch_norm_grads(kernels);     \
    fill_fisher_rows(kernels);          \
    fill_fisher_norm(kernels);          \
    fill_path_integral(kernels);        \
    fill_optim(kernels);                \
    fill_reservoir(kernels);            \
    fill_keyed(kernels);                \
    fill_gated_lateral(kernels);        \
    return kernels;                     \
  }                                     \
  }

LIMPET_DECLARE(baseline)
#if defined(LIMPET_X86)
LIMPET_DECLARE(v3)
LIMPET_DECLARE(v4)
#endif

namespace {

struct Level {
  std::string name;
  bool supported;
  Kernels (*table)();
};

std::vector<Level> levels() {
  std::vector<Level> all{{"baseline", true, baseline::table}};
#if defined(LIMPET_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  all.push_back({"x86-64-v3", v3, v3::table});
  all.push_back({"x86-64-v4", v4, v4::table});
#endif
  return all;
}

struct Chosen {
  std::string name;
  Kernels kernels;
};

Chosen choose() {
  const char* wanted = std::getenv("LIMPET_CPU");
  const std::vector<Level> all = levels();
  std::string known;
  for (auto level = all.rbegin(); level != all.rend(); ++level) {
    if (!wanted || !*wanted ? level->supported : level->name == wanted) {
      LIMPET_CHECK(level->supported, "LIMPET_CPU=" + level->name + ", but this processor does not have it");
      return {level->name, level->table()};
    }
    known = level->name + (known.empty() ? "" : ", ") + known;
  }
  LIMPET_CHECK(false, "LIMPET_CPU must be one of " + known + ", got " + wanted);
  return {};
}

const Chosen& chosen() {
  static const Chosen once = choose();
  return once;
}

}  // namespace

const Kernels& kernels() {
  return chosen().kernels;
}
const std::string& instruction_set() {
  return chosen().name;
}
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

}  // namespace limpet::cpu
