// Orthonormalisation of a block of vectors against a basis, and rotation of the basis in place.
#ifndef CURVAX_BLOCK_ORTHO_H_
#define CURVAX_BLOCK_ORTHO_H_

#include "curvax/types.h"

namespace curvax {

// The widest block that block_ortho takes.
constexpr int64_t kMaxBlock = 32;

// Stored rows are the basis vectors times `scale`. C below is double for kF64 and float otherwise.
// A row of the basis may be longer than a vector, so that every row is aligned whatever n is: what
// stands there from n on is not used, and new rows get zeros there.
struct BlockOrthoArgs {
  DType dtype;     // of the basis
  int64_t rows;    // m_max
  int64_t n;       // length of a vector
  int64_t stride;  // elements between rows of the basis, >= n
  int64_t used;    // m: rows [0, m) are orthonormal; used + block <= min(rows, n)
  int64_t block;   // b, at most kMaxBlock
  double scale;
  double lazy_below;  // the last update leaves the basis out below this deviation; 0: never
  uint64_t seed;      // of the directions that replace dependent ones

  void* basis;  // (rows, stride); rows [used, used + block) are written, later ones not touched
  void* w;      // (b, n) of C: the block on entry, scratch afterwards
  double* coefficients;  // (rows, b): Q^T W of the block on entry; rows from `used` on are 0
  double* factor;        // (b, b): upper triangular; W = Q C + Q_new S
  double* info;          // (4): passes, replaced directions, deviation before the last update, 0

  void* workspace;  // BlockOrthoWorkspaceBytes(...) bytes, 64-byte aligned
};

struct RotateBasisArgs {
  DType dtype;
  int64_t rows, n;         // whole rows are rotated, with their padding if they have any
  int64_t used;            // rows that are read
  int64_t kept;            // rows that are written
  void* basis;             // (rows, n)
  const double* rotation;  // (rows, rows): new row j is sum_{i < used} rotation[i, j] row i
  void* workspace;         // RotateBasisWorkspaceBytes(...) bytes, 64-byte aligned
};

}  // namespace curvax

#endif  // CURVAX_BLOCK_ORTHO_H_
