// A small copy from pinned host memory, read across the bus: copy engines may be busy with swap-ins for milliseconds.
extern "C" __global__ void __launch_bounds__(256) upload(const int* from, int* to, int n) {
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) to[i] = from[i];
}
