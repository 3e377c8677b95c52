// The CPU as a Device: cores, caches, instruction set; its memory and its measured rates.
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>

#include "cpu/backend.h"

namespace tilewise::cpu {
namespace {

std::string model_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(std::min(line.size(), line.find(':') + 2));
  }
  return "CPU";
}

// A cache size as the C library knows it, or what has been usual for ten years.
int64_t cache_bytes(int name, int64_t usual) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : usual;
}

const char* best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");  // every such CPU has F16C and LZCNT too
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (avx2) return "avx2";
  return __builtin_cpu_supports("sse4.2") ? "sse4" : "x86-64";
#else
  return "neon";
#endif
}

Device describe() {
  Device device;
  device.type = DeviceType::kCpu;
  device.name = model_name();
  device.arch = best_isa();
  device.near_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  device.desk_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 512 << 10);
  device.memory_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return device;
}

}  // namespace

Device device(int threads) {
  static const Device described = describe();
  Device result = described;
  // OMP_NUM_THREADS may be made for a larger machine than this process may use; a number that the caller gives is checked by plans.
  result.units = threads != 0 ? threads : std::min(omp_get_max_threads(), most_threads());
  return result;
}

std::vector<Device> devices() { return {device(0)}; }

void* allocate(const Device&, size_t bytes) { return ::operator new(std::max<size_t>(bytes, 1), std::align_val_t(256), std::nothrow); }
void release(const Device&, void* data) { ::operator delete(data, std::align_val_t(256)); }
Status copy(const Device&, void* target, const void* source, size_t bytes, bool) {
  std::memcpy(target, source, bytes);
  return {};
}
Result<int64_t> free_bytes(const Device&) { return static_cast<int64_t>(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGE_SIZE); }

Status synchronize(const Device&) { return {}; }

Result<Rates> measure_rates(const Device& on, DataType) {
  const Isa* isa = best_isa_of(on);
  if (!isa) return unsupported("arch " + on.arch + " has no kernels to measure");
  if (Status status = check_threads(on); !status.ok()) return status;
  const auto seconds = [](auto work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  Rates rates;
  constexpr int64_t kRepeats = 1'000'000;
  constexpr size_t kWords = size_t{32} << 20;  // 256 MiB, beyond any cache
  std::vector<uint64_t> words;
  try {
    words.assign(kWords, 1);
  } catch (const std::bad_alloc&) {
    return unavailable("measuring the memory's rate takes 256 MiB, which are not free");
  }
  volatile uint64_t sink = 0;
  for (int round = 0; round < 5; ++round) {  // the best of five: other work on the machine only ever lowers a rate
    int threads = 1;
    const double multiply = seconds([&] {
#pragma omp parallel num_threads(on.units)
      {
#pragma omp single nowait
        threads = omp_get_num_threads();
        isa->multiply_add(kRepeats);
      }
    });
    rates.flops_per_second = std::max(rates.flops_per_second, 2.0 * 48 * isa->lanes * kRepeats * threads / multiply);
    const double read = seconds([&] {
      uint64_t sum = 0;
#pragma omp parallel for num_threads(on.units) reduction(+ : sum) schedule(static)
      for (size_t i = 0; i < kWords; i += 8) {
        sum += words[i] + words[i + 1] + words[i + 2] + words[i + 3] + words[i + 4] + words[i + 5] + words[i + 6] + words[i + 7];
      }
      sink = sum;
    });
    rates.bytes_per_second = std::max(rates.bytes_per_second, kWords * 8.0 / read);
  }
  return rates;
}

}  // namespace tilewise::cpu

namespace tilewise {

Device Device::cpu(int threads) { return cpu::device(threads); }

const Backend& cpu_backend() {
  static const Backend backend{DeviceType::kCpu, cpu::devices,    cpu::kernels, cpu::measure_rates, cpu::allocate,
                               cpu::release,     cpu::free_bytes, cpu::copy,    cpu::synchronize,   cpu::check_threads};
  return backend;
}

}  // namespace tilewise
