// A small free list of large CPU blocks.
//
// Fresh memory costs more than the kernels: every output of tens of MiB is unmapped when it is freed, and paged in
// again on the next call. Blocks that tensors give back are kept instead, a bounded number of them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace smart_fast {

class Pool {
 public:
  static constexpr std::size_t smallest = std::size_t(1) << 16;    // below, malloc keeps blocks itself
  static constexpr std::size_t most_bytes = std::size_t(1) << 30;  // kept for later use, together
  static constexpr std::size_t most_blocks = 64;

  struct Block {
    void* data;
    std::size_t size;
  };

  // At least `size` bytes, 64-byte aligned. Throws std::bad_alloc.
  Block* take(std::size_t size) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if ((*it)->size >= size && (*it)->size - size <= size / 4 && (best == free_.end() || (*it)->size < (*best)->size))
          best = it;
      if (best != free_.end()) {
        Block* found = *best;
        free_.erase(best);
        bytes_ -= found->size;
        return found;
      }
    }
    const std::size_t rounded = (size + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, rounded);
    if (data == nullptr) {
      clear();
      data = std::aligned_alloc(64, rounded);
    }
    if (data == nullptr) throw std::bad_alloc();
    return new Block{data, rounded};
  }

  void give_back(Block* block) {
    std::vector<Block*> dropped;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      free_.push_back(block);
      bytes_ += block->size;
      while (bytes_ > most_bytes || free_.size() > most_blocks) {  // the oldest go first
        bytes_ -= free_.front()->size;
        dropped.push_back(free_.front());
        free_.erase(free_.begin());
      }
    }
    destroy(dropped);
  }

  // Frees what is kept; returns how many bytes that was.
  std::size_t clear() {
    std::vector<Block*> dropped;
    std::size_t bytes;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      dropped.swap(free_);
      bytes = bytes_;
      bytes_ = 0;
    }
    destroy(dropped);
    return bytes;
  }

  std::size_t bytes() {
    std::lock_guard<std::mutex> guard(mutex_);
    return bytes_;
  }

 private:
  static void destroy(const std::vector<Block*>& blocks) {
    for (Block* block : blocks) {
      std::free(block->data);
      delete block;
    }
  }

  std::mutex mutex_;
  std::vector<Block*> free_;
  std::size_t bytes_ = 0;
};

}  // namespace smart_fast
