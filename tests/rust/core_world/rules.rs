//! What must hold of a plan by itself, whatever went before.

use slora_core::{Counts, EngineConfig};

use super::model::VOCAB;
use super::plan::Plan;

/// Asserts the contract of `docs/architecture.md`.
pub fn check_shape(plan: &Plan, config: &EngineConfig, previous_num_sampled: u32) {
    check_requests(plan, config);
    check_tokens(plan, previous_num_sampled);
    check_segments(plan, config);
    check_sampling(plan, config);
    check_tables(plan, config);
}

fn check_requests(plan: &Plan, config: &EngineConfig) {
    let c = &plan.counts;
    assert!(c.num_rows <= config.max_batch_tokens && c.num_requests <= config.max_running, "budgets are kept");
    assert!(c.num_rows > 0 || c.num_copies > 0, "a plan has something to do");
    assert_eq!((plan.query_indptr[0], plan.page_indptr[0], plan.seg_indptr[0]), (0, 0, 0));
    assert_eq!(plan.query_indptr.last(), Some(&(c.num_rows as i32)), "requests cover all rows");
    assert_eq!(plan.page_indptr.last(), Some(&(c.num_page_indices as i32)));
    let (mut max_query_len, mut max_seq_len) = (0, 0);
    for r in 0..c.num_requests as usize {
        let (rows, pages) = (plan.rows(r), plan.pages(r));
        assert_eq!(rows.len() == 1, r < c.num_decode as usize, "requests with one row come first");
        let seq_len = plan.seq_lens[r] as u32;
        (max_query_len, max_seq_len) = (max_query_len.max(rows.len() as u32), max_seq_len.max(seq_len));
        assert_eq!(pages.len() as u32, seq_len.div_ceil(config.page_tokens), "a page table covers its sequence");
        assert!(pages.iter().all(|page| (0..config.num_pages as i32).contains(page)), "pages exist");
        assert_eq!(plan.positions[rows.end - 1] as u32 + 1, seq_len);
        let start = plan.positions[rows.start];
        for (i, row) in rows.enumerate() {
            let position = plan.positions[row] as usize;
            assert_eq!(position, start as usize + i, "a request's rows follow each other");
            let page_tokens = config.page_tokens as usize;
            let slot = pages[position / page_tokens] as usize * page_tokens + position % page_tokens;
            assert_eq!(plan.slots[row] as usize, slot, "a row's slot lies in its page table");
        }
    }
    assert_eq!((c.max_query_len, c.max_seq_len), (max_query_len, max_seq_len));
    assert!(max_seq_len <= config.max_context);
}

fn check_tokens(plan: &Plan, previous_num_sampled: u32) {
    for (row, &token) in plan.token_ids.iter().enumerate() {
        assert!(token < VOCAB as i32);
        assert!(token >= -(previous_num_sampled as i32), "row {row} refers to a row that was sampled before");
        assert!(token >= 0 || row < plan.counts.num_decode as usize, "only decode rows refer to sampled ids");
    }
}

fn check_segments(plan: &Plan, config: &EngineConfig) {
    assert_eq!(*plan.seg_indptr.last().unwrap(), plan.counts.num_rows as i32, "segments cover all rows");
    assert!(plan.seg_indptr.windows(2).all(|pair| pair[0] < pair[1]), "no segment is empty");
    let decode_rows = plan.counts.num_decode as i32;
    let split = plan.seg_indptr.partition_point(|start| *start < decode_rows);
    assert_eq!(plan.seg_indptr[split], decode_rows, "no segment has decode and prefill rows");
    for part in [&plan.seg_adapter[..split], &plan.seg_adapter[split..]] {
        assert!(part.windows(2).all(|pair| pair[0] < pair[1]), "rows of one adapter are one segment");
        assert!(part.iter().all(|row| (-1..config.max_adapters as i32).contains(row)));
    }
    for r in 0..plan.counts.num_requests as usize {
        let rows = plan.rows(r);
        assert_eq!(plan.adapter_of(rows.start), plan.adapter_of(rows.end - 1), "a request is in one segment");
    }
    let has_lora = plan.seg_adapter.iter().any(|row| *row >= 0);
    assert_eq!(plan.counts.flags & Counts::HAS_LORA > 0, has_lora);
}

fn check_sampling(plan: &Plan, config: &EngineConfig) {
    let last_rows: Vec<i32> = (0..plan.counts.num_requests as usize).map(|r| plan.rows(r).end as i32 - 1).collect();
    assert!(plan.sample_rows.iter().all(|row| last_rows.contains(row)), "a request's last row is sampled");
    assert!(plan.sample_rows.is_sorted());
    let mut rows = plan.state_rows.clone();
    rows.sort_unstable();
    rows.dedup();
    assert_eq!(rows.len(), plan.state_rows.len(), "a state row is one request's");
    assert!(rows.iter().chain(&plan.reset_rows).all(|row| (0..config.max_running as i32).contains(row)));
    let one = 1f32.to_bits() as i32;
    let is_random = plan.temperature.iter().any(|bits| *bits != 0);
    let has_penalties = plan.presence.iter().chain(&plan.frequency).any(|bits| *bits != 0)
        || plan.repetition.iter().any(|bits| *bits != one);
    assert_eq!(plan.counts.flags & Counts::HAS_RANDOM > 0, is_random);
    assert_eq!(plan.counts.flags & Counts::HAS_PENALTIES > 0, has_penalties);
    assert_eq!(plan.counts.max_logprobs, plan.num_logprobs.iter().copied().max().unwrap_or(-1));
    assert_eq!(plan.counts.max_prompt_logprobs, plan.prompt_num_logprobs.iter().copied().max().unwrap_or(-1));
    for (row, target) in plan.prompt_rows.iter().zip(&plan.prompt_targets) {
        let next = *row as usize + 1;
        let is_known = last_rows.contains(row) || plan.token_ids[next] == *target;
        assert!(is_known, "a prompt row's target is the next token");
    }
}

fn check_tables(plan: &Plan, config: &EngineConfig) {
    let mut owned: Vec<i32> = plan.page_indices.iter().chain(&plan.copy_pages).copied().collect();
    owned.sort_unstable();
    assert!(owned.windows(2).all(|pair| pair[0] != pair[1]), "no page has two owners in a plan");
    assert!(owned.iter().all(|page| (0..config.num_pages as i32).contains(page)));
    let mut rows = plan.changed_rows.clone();
    rows.sort_unstable();
    assert!(rows.windows(2).all(|pair| pair[0] != pair[1]), "a descriptor row changes once");
    assert!(plan.changed_pages.iter().all(|page| !plan.page_indices.contains(page)));
    for indptr in [&plan.bias_indptr, &plan.reset_indptr, &plan.changed_pages_indptr] {
        assert!(indptr[0] == 0 && indptr.is_sorted());
    }
    assert_eq!(*plan.bias_indptr.last().unwrap(), plan.counts.num_bias as i32);
    assert_eq!(*plan.reset_indptr.last().unwrap(), plan.counts.num_reset_tokens as i32);
    assert_eq!(*plan.changed_pages_indptr.last().unwrap(), plan.counts.num_changed_pages as i32);
}
