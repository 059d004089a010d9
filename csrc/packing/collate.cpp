#include "collate.h"

#include <algorithm>
#include <numeric>

namespace nova::packing {
namespace {

template <class T>
void widen(const void* data, std::int64_t length, std::int64_t* out) {
  std::copy_n(static_cast<const T*>(data), length, out);
}

void widen(const Tokens& tokens, std::int64_t* out) {
  switch (tokens.type) {
    case TokenType::int8: return widen<std::int8_t>(tokens.data, tokens.length, out);
    case TokenType::uint8: return widen<std::uint8_t>(tokens.data, tokens.length, out);
    case TokenType::int16: return widen<std::int16_t>(tokens.data, tokens.length, out);
    case TokenType::uint16: return widen<std::uint16_t>(tokens.data, tokens.length, out);
    case TokenType::int32: return widen<std::int32_t>(tokens.data, tokens.length, out);
    case TokenType::uint32: return widen<std::uint32_t>(tokens.data, tokens.length, out);
    case TokenType::int64: return widen<std::int64_t>(tokens.data, tokens.length, out);
  }
}

}  // namespace

std::int64_t lay_out(const std::vector<Tokens>& ids, const std::vector<Tokens>* labels, std::int64_t total, Row row) {
  std::int64_t at = 0, longest = 0;
  *row.cu_seqlens++ = 0;
  const auto close_segment = [&](std::int64_t length) {
    std::iota(row.position_ids + at, row.position_ids + at + length, std::int64_t{0});
    at += length;
    longest = std::max(longest, length);
    *row.cu_seqlens++ = static_cast<std::int32_t>(at);
  };
  for (std::size_t sample = 0; sample < ids.size(); ++sample) {
    const Tokens& tokens = ids[sample];
    widen(tokens, row.input_ids + at);
    if (labels) {
      widen((*labels)[sample], row.labels + at);
    } else {
      std::copy_n(row.input_ids + at, tokens.length, row.labels + at);
    }
    row.labels[at] = ignore_index;
    close_segment(tokens.length);
  }
  if (at < total) {
    std::fill(row.input_ids + at, row.input_ids + total, 0);
    std::fill(row.labels + at, row.labels + total, ignore_index);
    close_segment(total - at);
  }
  return longest;
}

void concatenate(const std::vector<Bytes>& pieces, std::int64_t total, void* out) {
  auto* at = static_cast<unsigned char*>(out);
  auto* const end = at + total;
  for (const Bytes& piece : pieces) at = std::copy_n(static_cast<const unsigned char*>(piece.data), piece.size, at);
  std::fill(at, end, static_cast<unsigned char>(0));
}

}  // namespace nova::packing
