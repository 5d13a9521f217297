// In place of the compiler's header where AVX-512 and AVX-VNNI are emulated (.ci/emulated): what the compiler's flags leave
// out, SIMDe does.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE  // inlined, its functions take minutes to compile
#include <simde/x86/avx512.h>

#define _mm512_cvtepi8_epi32(a) simde_mm512_cvtepi16_epi32(_mm256_cvtepi8_epi16(a))  // SIMDe has none
