// The little of OpenBLAS that src/reference calls, for a cross build that has none. Correct, not fast.
#pragma once

enum CBLAS_ORDER { CblasRowMajor = 101 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112 };

inline void openblas_set_num_threads(int) {}

// c = alpha * op(a) * op(b) + beta * c, rows `lda`, `ldb` and `ldc` elements apart; as BLAS says, c is not read where beta is 0.
inline void cblas_sgemm(CBLAS_ORDER, CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int m, int n, int k, float alpha,
                        const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  for (long i = 0; i < m; ++i) {
    for (long j = 0; j < n; ++j) {
      float sum = 0;
      for (long x = 0; x < k; ++x) {
        const float left = transpose_a == CblasTrans ? a[x * lda + i] : a[i * lda + x];
        const float right = transpose_b == CblasTrans ? b[j * ldb + x] : b[x * ldb + j];
        sum += left * right;
      }
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
  }
}
