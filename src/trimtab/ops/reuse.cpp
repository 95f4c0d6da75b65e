// torch's allocator on the CPU, but for where its alignment comes from. torch asks glibc for aligned blocks (posix_memalign), and glibc
// (seen with 2.36) looks for one that is larger by the alignment: a freed block never serves the next request of its own size. Here glibc
// gets an ordinary request of that larger size, so equal requests use the same block again, and the tensor begins at a multiple of 64 in it.
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr uintptr_t ALIGNMENT = 64;
static_assert(sizeof(void*) == 8, "the sizes of blocks must be smaller than any address");

// oneDNN gives back by whatever allocator torch has at that time, so what torch's own made comes here too: by its first byte. Before that
// glibc keeps the block's size, with flags in its lowest bits. No block is as large as the number of its address, which ours have there.
void give_back(void* data) {
    if (data == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    void* block = static_cast<void**>(data)[-1];
    const bool ours = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(block) <= ALIGNMENT;
    std::free(ours ? block : data);
}

struct Reusing final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (bytes == 0) return {nullptr, nullptr, &give_back, cpu};
        auto* block = bytes > SIZE_MAX - ALIGNMENT ? nullptr : static_cast<char*>(std::malloc(bytes + ALIGNMENT));
        if (block == nullptr) c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
        TORCH_CHECK(block != nullptr, "can't allocate memory: you tried to allocate ", bytes, " bytes.");
        // malloc's blocks begin at multiples of 16, so at least 16 bytes lie before the data: the block's own address goes there
        auto* data = block + (ALIGNMENT - reinterpret_cast<uintptr_t>(block) % ALIGNMENT);
        reinterpret_cast<void**>(data)[-1] = block;
        c10::profiledCPUMemoryReporter().New(data, bytes);
        return {data, data, &give_back, cpu};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// Nothing where it was done, else why not. Tensors that exist already are freed as they were allocated.
extern "C" const char* reuse_blocks() {
    void* glibc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
    if (glibc == nullptr || dlsym(glibc, "free") != dlsym(RTLD_DEFAULT, "free")) return "this process has another malloc than glibc's";
    static auto* allocator = new Reusing;  // never destroyed: tensors are made and freed until the process is gone
    if (c10::GetCPUAllocator() == allocator) return nullptr;
    if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return "another library has set torch's allocator";
    std::atomic_thread_fence(std::memory_order_release);  // other threads see it whole
    c10::SetCPUAllocator(allocator, 1);
    return nullptr;
}
