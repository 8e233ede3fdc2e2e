//! What a step's output means for its requests.

use crate::engine::Engine;
use crate::event::{EndReason, PromptEvent, TokenEvent};

impl Engine {
    /// Takes the ids that a step sampled, in the order of its sampled rows; −1: the row's logits were not finite.
    ///
    /// Rows of requests that ended meanwhile are ignored. Pages of requests that end here are free for the next plan.
    ///
    /// # Panics
    /// If `step` is not the oldest launched step, or `sampled` has not one id for each sampled row.
    pub fn commit(&mut self, _now_us: u64, step: u32, sampled: &[i32]) {
        let Some(mut launched) = self.launched.pop_front() else {
            panic!("step {step} is committed, but none was scheduled")
        };
        assert_eq!(launched.step, step, "steps are committed in the order in which they were scheduled");
        assert_eq!(launched.sampled.len(), sampled.len(), "a step's output has one id for each sampled row");
        for (place, seq, position, row, len) in launched.prompt_rows.drain(..) {
            if let Some(request) = self.find_request(place, seq) {
                let request = request.id;
                self.events.prompts.push(PromptEvent { request, position, row, len });
            }
        }
        for (place, seq) in launched.prompts_done.drain(..) {
            if self.find_request(place, seq).is_some() {
                self.finish(place, EndReason::Length);
            }
        }
        for (row, ((place, seq), &token)) in launched.sampled.drain(..).zip(sampled).enumerate() {
            self.commit_token(place, seq, row as u32, token);
        }
        self.spare_steps.push(launched);
    }

    #[inline]
    fn commit_token(&mut self, place: u32, seq: u64, row: u32, token: i32) {
        let Some(request) = self.requests[place as usize].as_mut().filter(|request| request.seq() == seq) else {
            return;
        };
        request.pending -= 1;
        let Ok(token) = u32::try_from(token) else { return self.finish(place, EndReason::NotFinite) };
        request.tokens.push(token);
        self.queue.generated(&request.ticket);
        self.stats.generated_tokens += 1;
        self.events.tokens.push(TokenEvent { request: request.id, token, row });
        let params = &request.params;
        let is_eos = !params.ignore_eos && self.config.eos_token_ids.contains(&token);
        if is_eos || params.stop_token_ids.contains(&token) {
            self.finish(place, EndReason::Stop(token));
        } else if request.tokens.len() as u32 >= request.max_len {
            self.finish(place, EndReason::Length);
        }
    }
}
