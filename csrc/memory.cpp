// Memory fresh from the system arrives in pages of 4 KiB as it is touched, and for hundreds of megabytes that takes as long
// as filling them. Large pages arrive five hundred times less often.

#include <cstdint>

#include "operators.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace negotiator {

void ask_for_large_pages([[maybe_unused]] const Tensor& x) {
  require(x.is_cpu(), "x must be on the CPU");
#if defined(__linux__)
  if (x.numel() == 0) return;
  int64_t elements = 1;
  for (int64_t i = 0; i < x.dim(); ++i) elements += (x.size(i) - 1) * x.stride(i);
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (address + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (address + elements * x.element_size()) / kLarge * kLarge;
  // A refusal costs time, not correctness: the answer is not looked at.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace negotiator
