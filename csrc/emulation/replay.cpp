// Makes one call of a kernel that a file describes, in a program of its own for the sanitizers to watch. The
// buffers have no byte to spare, and what the kernel is to write starts as NaN.
//
// File: integers of 64 bits, then bytes. The call (0, 1: forward, backward of deform_conv2d; 2, 3: of
// mixed_op; 4: feature_gather; 5, 6: forward, backward of deform_conv2d's columns), dtype, seed of the order,
// barrier and wait to skip, the fields of Params, and for each pointer the bytes of its buffer, or -1 for
// null, and whether its content follows. Then the contents. The other buffers are written to the second file.
#include <cstdio>
#include <memory>

#include "common/fields.hpp"
#include "deform_conv2d/deform_conv2d_cuda.cu"
#include "feature_gather/feature_gather_cuda.cu"
#include "mixed_op/mixed_op_cuda.cu"

namespace {

struct File {
    std::FILE* file;
    File(const char* path, const char* mode) : file(std::fopen(path, mode)) {
        if (!file) throw std::runtime_error(std::string("cannot open ") + path);
    }
    ~File() { std::fclose(file); }
    void read(void* memory, size_t bytes) {
        if (std::fread(memory, 1, bytes, file) != bytes) throw std::runtime_error("the file is too short");
    }
    int64_t integer() {
        int64_t value;
        read(&value, sizeof value);
        return value;
    }
};

struct Buffer {
    int64_t bytes, given;
    std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};

    void allocate() {
        if (bytes < 0) return;
        void* address = nullptr;
        if (posix_memalign(&address, 256, size_t(bytes))) throw std::bad_alloc();
        memory.reset(static_cast<unsigned char*>(address));
        std::memset(address, 0xff, size_t(bytes));
    }
};

// Workspace is called with (T(), params), call with (params, tensors, workspace).
template <class Params, template <class> class Tensors, class Workspace, class Call>
void replay(File& in, File& out, int64_t dtype, const Workspace& workspace, const Call& call) {
    nasfast::Fields<Params> sizes;
    for (int64_t& size : sizes) size = in.integer();
    nasfast::Fields<Tensors<float>> pointers;
    std::vector<Buffer> buffers(pointers.size());
    for (Buffer& buffer : buffers) {
        buffer.bytes = in.integer();
        buffer.given = in.integer();
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
        buffers[i].allocate();
        pointers[i] = reinterpret_cast<int64_t>(buffers[i].memory.get());
        if (buffers[i].given) in.read(buffers[i].memory.get(), size_t(buffers[i].bytes));
    }
    const auto params = nasfast::unpack<Params>(sizes);
    nasfast::with_type(dtype, [&](auto type) {
        Buffer space{workspace(type, params), false};
        space.allocate();
        call(params, nasfast::unpack<Tensors<decltype(type)>>(pointers), space.memory.get());
    });
    for (const Buffer& buffer : buffers)
        if (!buffer.given && buffer.bytes > 0)
            std::fwrite(buffer.memory.get(), 1, size_t(buffer.bytes), out.file);
}

#define NASFAST_REPLAY(op, way, Tensors)                                                                \
    replay<nasfast::op::Params, nasfast::op::Tensors>(                                                  \
        in, out, dtype,                                                                                 \
        [](auto type, const auto& p) { return nasfast::op::cuda::way##_workspace<decltype(type)>(p); }, \
        [](const auto& p, const auto& t, void* space) { nasfast::op::cuda::way(p, t, space, nullptr); })
#define NASFAST_REPLAY_COLUMNS(way, Tensors)                               \
    replay<nasfast::deform_conv2d::Part, nasfast::deform_conv2d::Tensors>( \
        in, out, dtype, [](auto, const auto&) { return 0; },               \
        [](const auto& p, const auto& t, void*) {                          \
            nasfast::deform_conv2d::cuda::columns_##way(p, t, nullptr);    \
        })

}  // namespace

int main(int count, char** arguments) try {
    if (count != 3) throw std::runtime_error("the arguments must be two files");
    File in(arguments[1], "rb"), out(arguments[2], "wb");
    const int64_t call = in.integer(), dtype = in.integer();
    nasfast::emulation::set_order(uint64_t(in.integer()));
    const int64_t barrier = in.integer(), wait = in.integer();
    nasfast::emulation::skip(barrier, wait);
    switch (call) {
        case 0:
            NASFAST_REPLAY(deform_conv2d, forward, Forward);
            break;
        case 1:
            NASFAST_REPLAY(deform_conv2d, backward, Backward);
            break;
        case 2:
            NASFAST_REPLAY(mixed_op, forward, Forward);
            break;
        case 3:
            NASFAST_REPLAY(mixed_op, backward, Backward);
            break;
        case 4:
            NASFAST_REPLAY(feature_gather, forward, Call);
            break;
        case 5:
            NASFAST_REPLAY_COLUMNS(forward, ColumnsForward);
            break;
        default:
            NASFAST_REPLAY_COLUMNS(backward, ColumnsBackward);
    }
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
