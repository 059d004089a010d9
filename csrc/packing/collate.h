// Samples side by side in one row of `total` tokens; what the samples leave free is one segment of padding.
#pragma once

#include <cstdint>
#include <vector>

namespace nova::packing {

enum class TokenType { int8, uint8, int16, uint16, int32, uint32, int64 };

// The tokens of one sample, or its labels.
struct Tokens {
  const void* data;
  std::int64_t length;
  TokenType type;
};

// Where the row goes; each of the first three holds `total` entries, cu_seqlens one per segment and one more.
struct Row {
  std::int64_t* input_ids;
  std::int64_t* labels;
  std::int64_t* position_ids;
  std::int32_t* cu_seqlens;
};

constexpr std::int64_t ignore_index = -100;

// Writes the row; without `labels` they are copied from the ids. The first label of every segment is ignore_index, and so
// is every label of the padding; its ids are 0. Returns the length of the longest segment.
std::int64_t lay_out(const std::vector<Tokens>& ids, const std::vector<Tokens>* labels, std::int64_t total, Row row);

// One piece of a field of any type.
struct Bytes {
  const void* data;
  std::int64_t size;
};

// The pieces one after the other, then zeros up to `total` bytes.
void concatenate(const std::vector<Bytes>& pieces, std::int64_t total, void* out);

}  // namespace nova::packing
