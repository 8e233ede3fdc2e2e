//! A StepPlan as an executor reads it: the arrays by name, cut to their lengths.

use slora_core::{Array, Counts, PlanLayout};

macro_rules! plan {
    ($counts:ident, $words:ident; $($name:ident: $len:expr),* $(,)?) => {
        /// One plan, copied out of the buffer.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Plan {
            pub counts: Counts,
            $(pub $name: Vec<i32>),*
        }

        /// Finds the arrays in a buffer.
        pub struct PlanReader {
            arrays: Vec<Array>,
            descriptor_words: usize,
        }

        impl PlanReader {
            pub fn new(layout: &PlanLayout, descriptor_words: u32) -> Self {
                let find = |name: &str| *layout.arrays().iter().find(|array| array.name == name).unwrap();
                let known = [$(stringify!($name)),*];
                for array in layout.arrays() {
                    assert!(array.name == "counts" || known.contains(&array.name), "nobody reads {}", array.name);
                }
                Self { arrays: vec![$(find(stringify!($name))),*], descriptor_words: descriptor_words as usize }
            }

            pub fn read(&self, $counts: Counts, buffer: &[i32]) -> Plan {
                assert_eq!(&buffer[..21], $counts.words(), "the first array holds the counts");
                let $words = self.descriptor_words;
                let mut arrays = self.arrays.iter();
                Plan {
                    counts: $counts,
                    $($name: {
                        let (array, len) = (arrays.next().unwrap(), $len as usize);
                        assert!(len <= array.capacity, "{} has {len} words, its place {}", array.name, array.capacity);
                        buffer[array.offset..array.offset + len].to_vec()
                    }),*
                }
            }
        }
    };
}

plan! { c, words;
    token_ids: c.num_rows, positions: c.num_rows, slots: c.num_rows,
    query_indptr: c.num_requests + 1, seq_lens: c.num_requests, page_indptr: c.num_requests + 1,
    page_indices: c.num_page_indices,
    seg_indptr: c.num_segments + 1, seg_adapter: c.num_segments,
    sample_rows: c.num_sampled, state_rows: c.num_sampled,
    temperature: c.num_sampled, top_p: c.num_sampled, min_p: c.num_sampled,
    presence: c.num_sampled, frequency: c.num_sampled, repetition: c.num_sampled,
    uniform: c.num_sampled, top_k: c.num_sampled, num_logprobs: c.num_sampled,
    bias_indptr: c.num_sampled + 1, bias_ids: c.num_bias, bias_values: c.num_bias,
    reset_rows: c.num_resets, reset_prompt_lens: c.num_resets, reset_indptr: c.num_resets + 1,
    reset_tokens: c.num_reset_tokens,
    prompt_rows: c.num_prompt_logprobs, prompt_targets: c.num_prompt_logprobs,
    prompt_num_logprobs: c.num_prompt_logprobs,
    copy_host_pages: c.num_copies, copy_pages: c.num_copies, copy_layers: c.num_copies,
    changed_rows: c.num_changed, changed_pages_indptr: c.num_changed + 1, changed_pages: c.num_changed_pages,
    changed_modules: c.num_changed as usize * words,
}

impl Plan {
    /// The entries of CSR array `values` that belong to `i`.
    pub fn part<'a>(indptr: &[i32], values: &'a [i32], i: usize) -> &'a [i32] {
        &values[indptr[i] as usize..indptr[i + 1] as usize]
    }

    /// Rows of request `r`.
    pub fn rows(&self, r: usize) -> std::ops::Range<usize> {
        self.query_indptr[r] as usize..self.query_indptr[r + 1] as usize
    }

    /// The page table of request `r`.
    pub fn pages(&self, r: usize) -> &[i32] {
        Self::part(&self.page_indptr, &self.page_indices, r)
    }

    /// The descriptor row of a row's segment; −1: base.
    pub fn adapter_of(&self, row: usize) -> i32 {
        self.seg_adapter[self.seg_indptr.partition_point(|start| *start as usize <= row) - 1]
    }
}
