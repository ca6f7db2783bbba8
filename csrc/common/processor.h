#pragma once

#include <cstdint>

// What a processor can do, as it tells (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID and
// XGETBV; AMD64 Architecture Programmer's Manual, volume 3, appendix E).
namespace fastbert {

// Words of CPUID, by the leaf and the register that hold them; and the registers that the operating system keeps.
struct Processor {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_edx = 0;
  uint32_t leaf7_1_eax = 0;
  uint32_t extended1_ecx = 0;  // leaf 0x80000001
  uint32_t xcr0 = 0;           // its lower half
};

// This one; all zeros where it is no x86.
Processor this_processor();

// Whether a processor, and its operating system, can run all that the compiler may use for these targets.
bool has_v3(const Processor& processor);
bool has_v4(const Processor& processor);
bool has_amx(const Processor& processor);

}  // namespace fastbert
