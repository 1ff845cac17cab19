// Small matrix product on GNU vector extensions. Included by per-ISA sources.
#pragma once

#include <cstdint>

namespace nasfast::NASFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 8;  // rows x columns of accumulators that fit in the registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2;

template <class T>
struct Simd {
    typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
    static constexpr int width = kVectorBytes / sizeof(T);
};

// c[i, j] += sum_k a[i * a_row + k * a_col] * b[k * ldb + j] for Rows x Columns vectors of c.
template <int Rows, int Columns, class T>
inline void gemm_block(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c,
                       int64_t ldc) {
    using Vector = typename Simd<T>::Vector;
    constexpr int width = Simd<T>::width;
    Vector sum[Rows][Columns] = {};
    for (int64_t k = 0; k < depth; ++k) {
        for (int j = 0; j < Columns; ++j) {
            const Vector column = *reinterpret_cast<const Vector*>(b + k * ldb + j * width);
            for (int i = 0; i < Rows; ++i) sum[i][j] += a[i * a_row + k * a_col] * column;
        }
    }
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < Columns; ++j) *reinterpret_cast<Vector*>(c + i * ldc + j * width) += sum[i][j];
}

template <int Rows, class T>
inline void gemm_rows(int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b,
                      int64_t ldb, T* c, int64_t ldc) {
    constexpr int width = Simd<T>::width;
    int64_t j = 0;
    for (; j + kColumns * width <= columns; j += kColumns * width)
        gemm_block<Rows, kColumns>(depth, a, a_row, a_col, b + j, ldb, c + j, ldc);
    for (; j + width <= columns; j += width)
        gemm_block<Rows, 1>(depth, a, a_row, a_col, b + j, ldb, c + j, ldc);
    for (; j < columns; ++j) {
        T sum[Rows] = {};
        for (int64_t k = 0; k < depth; ++k)
            for (int i = 0; i < Rows; ++i) sum[i] += a[i * a_row + k * a_col] * b[k * ldb + j];
        for (int i = 0; i < Rows; ++i) c[i * ldc + j] += sum[i];
    }
}

// c += a @ b with c [rows, columns], b [depth, columns] and a [rows, depth] of any strides. The order of
// summation is fixed. Sums over `depth` start from zero, so that long reductions fed in pieces stay exact.
template <class T>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col,
                 const T* b, int64_t ldb, T* c, int64_t ldc) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
        gemm_rows<kRows>(columns, depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
    for (; i < rows; ++i) gemm_rows<1>(columns, depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
}

}  // namespace nasfast::NASFAST_ISA
