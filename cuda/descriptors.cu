// Takes over the descriptor rows that a plan changes.
// modules [max_adapters, words], pages [max_adapters, max_pages]; rows [num_changed] of them get the plan's
// changed_modules [num_changed, words] and changed_pages (CSR by indptr).
// A block per changed row: plain copies.
extern "C" __global__ void update_descriptors(
    const int* __restrict__ rows, const int* __restrict__ indptr, const int* __restrict__ changed_pages,
    const int* __restrict__ changed_modules, int words, int max_pages, int* __restrict__ modules,
    int* __restrict__ pages) {
    const size_t i = blockIdx.x, row = rows[i];
    for (int w = threadIdx.x; w < words; w += blockDim.x) modules[row * words + w] = changed_modules[i * words + w];
    const int first = indptr[i], num_pages = indptr[i + 1] - first;
    for (int p = threadIdx.x; p < num_pages; p += blockDim.x) pages[row * max_pages + p] = changed_pages[first + p];
}
