// A libcuda for machines without one: the functions that oisd_kernels/cuda/driver.py calls, with
// cuda.h's own prototypes, so that arguments which ctypes passes wrongly arrive wrongly. Each writes
// a line of what it got. As in the driver, most of them need a current context.
#include <cuda.h>

#include <string>
#include <vector>

static std::string heard;
static std::vector<CUcontext> current;
static int modules;

template <class... Parts>
static void hear(const char* format, Parts... parts) {
  char line[500];
  std::snprintf(line, sizeof line, format, parts...);
  heard += line;
  heard += '\n';
}

// What was heard since the last call.
extern "C" const char* listen() {
  static std::string last;
  last = heard;
  heard.clear();
  return last.c_str();
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  if (error == CUDA_ERROR_INVALID_CONTEXT) return *text = "invalid device context", CUDA_SUCCESS;
  return *text = nullptr, CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = 10 + ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute != CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN || device < 10)
    return CUDA_ERROR_INVALID_VALUE;
  return *value = 227 * 1024, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(0x7000000000000000 + device);
  hear("retain %d", device);
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
  current.push_back(context);
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = current.back();
  current.pop_back();
  return CUDA_SUCCESS;
}
extern "C" int contexts() { return int(current.size()); }

static int device_of_context() {
  return current.empty() ? -1 : int(reinterpret_cast<long long>(current.back()) & 0xffff);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *module = reinterpret_cast<CUmodule>(0x6000000000000000 + ++modules);
  hear("load %s on %d", static_cast<const char*>(image), device_of_context());
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *function = reinterpret_cast<CUfunction>(reinterpret_cast<long long>(module) + 0x100);
  hear("find %s", name);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || !function)
    return CUDA_ERROR_INVALID_VALUE;
  hear("shared %d", value);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void** params, void** extra) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (extra || !function) return CUDA_ERROR_INVALID_VALUE;
  const auto* first = static_cast<const unsigned long long*>(params[0]);
  hear("launch %llx on %d: %u %u %u x %u %u %u, shared %u, stream %llx, argument %llx",
       reinterpret_cast<unsigned long long>(function), device_of_context(), grid_x, grid_y, grid_z,
       block_x, block_y, block_z, shared, reinterpret_cast<unsigned long long>(stream), first[0]);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (reinterpret_cast<unsigned long long>(map) % alignof(CUtensorMap) || rank != 3)
    return CUDA_ERROR_INVALID_VALUE;
  hear("map on %d: %s at %llx, %llu %llu %llu by %llu %llu, box %u %u %u, steps %u %u %u%s%s%s%s",
       device_of_context(), type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? "bfloat16"
                            : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? "float16"
                                                                      : "other",
       reinterpret_cast<unsigned long long>(address), static_cast<unsigned long long>(sizes[0]),
       static_cast<unsigned long long>(sizes[1]), static_cast<unsigned long long>(sizes[2]),
       static_cast<unsigned long long>(strides[0]), static_cast<unsigned long long>(strides[1]),
       box[0], box[1], box[2], steps[0], steps[1], steps[2],
       interleave == CU_TENSOR_MAP_INTERLEAVE_NONE ? "" : ", interleaved",
       swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? ", swizzled by 128" : "",
       promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B ? ", promoted to 128" : "",
       fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ? ", zeros outside" : "");
  for (int i = 0; i < CU_TENSOR_MAP_NUM_QWORDS; i++) map->opaque[i] = 100 + i;
  return CUDA_SUCCESS;
}
