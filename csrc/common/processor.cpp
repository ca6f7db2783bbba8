#include "processor.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace fastbert {
namespace {

template <typename... Bits>
constexpr uint32_t bits(Bits... numbers) {
  return ((uint32_t{1} << numbers) | ...);
}

constexpr bool has_all(uint32_t word, uint32_t wanted) { return (word & wanted) == wanted; }

}  // namespace

Processor this_processor() {
  Processor processor;
#if defined(__x86_64__) && defined(__GNUC__)
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) processor.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    processor.leaf7_ebx = b;
    processor.leaf7_edx = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) processor.leaf7_1_eax = a;
  }
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) processor.extended1_ecx = c;
  if (has_all(processor.leaf1_ecx, bits(27))) {  // OSXSAVE: there is an XGETBV
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    processor.xcr0 = a;
  }
#endif
  return processor;
}

// System V ABI, AMD64 supplement, section 3.1.1: the levels and what is in them.

bool has_v3(const Processor& p) {
  // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C
  return has_all(p.leaf1_ecx, bits(0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29)) &&
         has_all(p.leaf7_ebx, bits(3, 5, 8)) &&    // BMI1, AVX2, BMI2
         has_all(p.extended1_ecx, bits(0, 5)) &&   // LAHF and SAHF, LZCNT
         has_all(p.xcr0, bits(1, 2));              // XMM, YMM
}

bool has_v4(const Processor& p) {
  return has_v3(p) && has_all(p.leaf7_ebx, bits(16, 17, 28, 30, 31)) &&  // AVX512F, DQ, CD, BW, VL
         has_all(p.xcr0, bits(5, 6, 7));                                 // masks, ZMM
}

bool has_amx(const Processor& p) {
  return has_v4(p) && has_all(p.leaf7_1_eax, bits(5)) &&  // AVX512-BF16
         has_all(p.leaf7_edx, bits(22, 24)) &&            // AMX-BF16, AMX-TILE
         has_all(p.xcr0, bits(17, 18));                   // the tiles' configuration and data
}

}  // namespace fastbert
