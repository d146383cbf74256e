// Fetching what is read next while something else is computed; part of kernels.inl.
//
// Rows of a matrix that are far apart are no pattern that a processor sees, and a panel of them is read in one go: it
// would wait for each line. So lines are asked for one after another, a few with every tile of the panel before.

class Ahead {
 public:
  // Nothing.
  Ahead() = default;

  // Columns of rows of a matrix, in as many parts as there are tiles before.
  template <class E>
  Ahead(const E* from, int64_t stride, int64_t rows, int64_t columns, int64_t parts)
      : row_(reinterpret_cast<const char*>(from)),
        stride_(stride * int64_t(sizeof(E))),
        bytes_(columns * int64_t(sizeof(E))),
        rows_(rows),
        part_(parts > 0 ? ceil_div(rows * ceil_div(bytes_, 64), parts) : 0) {}

  // The next part, into the L2 cache.
  void fetch() {
    for (int64_t n = 0; n < part_ && rows_ > 0; ++n) {
      __builtin_prefetch(row_ + byte_, 0, 2);
      byte_ += 64;
      if (byte_ >= bytes_) byte_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, part_ = 0, byte_ = 0;
};
