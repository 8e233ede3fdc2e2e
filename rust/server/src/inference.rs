//! What chat and completions share: from a parsed request to its answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slora_runtime::{Delta, End, RequestError, Sampling};

use crate::admission::{Load, Reservation};
use crate::app::{App, Target};
use crate::connection::Unsent;
use crate::errors::{ApiError, text_error};
use crate::generation::{Generation, OpenStream, Start};
use crate::log::unix_time_s;
use crate::quota::Place;
use crate::record::Record;
use crate::reply::{Collected, Prompt, Reply, Shape};
use crate::router::{Answer, Call, json_response, new_id};
use crate::sampling::Streaming;
use crate::sse::{EventStream, Outlet};

/// A request whose fields were understood.
pub(crate) struct Inference {
    pub shape: Shape,
    pub target: Target,
    pub n: u32,
    pub sampling: Sampling,
    pub streaming: Streaming,
    pub echo: bool,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: bool,
    pub return_token_ids: bool,
}

/// A request that was let in: its places are its own until this is dropped.
pub(crate) struct Admitted {
    reservation: Reservation,
    place: Option<Place>,
}

/// Lets a request in before anything is tokenized. `prompt_tokens`: an upper bound for each prompt.
pub(crate) fn admit(call: &mut Call, prompt_tokens: &[usize], n: u32) -> Result<Admitted, ApiError> {
    let app = &call.app;
    let choices = prompt_tokens.len() as u64 * u64::from(n);
    let limit = app.max_choices() as u64;
    if choices > limit {
        let message =
            format!("{} prompts with {n} choices each are {choices}, the limit is {limit}", prompt_tokens.len());
        return Err(ApiError::invalid("n", message));
    }
    if let Some(key) = &call.caller.key {
        key.quota.check(choices)?;
    }
    let max_context = app.runtime.config().max_context as usize;
    let tokens: usize = prompt_tokens.iter().map(|tokens| (*tokens).min(max_context)).sum();
    let tokens = tokens as u64 * u64::from(n);
    let Some(mut reservation) = call.reservation.take() else {
        return Err(ApiError::internal("the request came without a body"));
    };
    reservation.grow(Load { requests: choices, tokens, bytes: 0 })?;
    let place = match &call.caller.key {
        Some(key) => Some(key.usage.enter(&key.quota, choices as u32, Instant::now())?),
        None => None,
    };
    Ok(Admitted { reservation, place })
}

/// Refuses text that is too long whatever its tokens are, before anything is spent on it.
pub(crate) fn check_text_len(app: &App, bytes: usize) -> Result<(), ApiError> {
    let Some(text) = app.runtime.text() else { return Ok(()) };
    text.check_len(bytes, app.runtime.config().max_context).map_err(|error| text_error(&error))
}

/// Cuts a prompt to its last `keep` ids. One that does not fit the context even so is refused here: not after it was made
/// text, copied for every choice and sent to the engine.
pub(crate) fn fit(app: &App, ids: &mut Vec<u32>, keep: usize, max_tokens: Option<u32>) -> Result<(), ApiError> {
    ids.drain(..ids.len().saturating_sub(keep));
    Ok(app.runtime.config().check_len(ids.len(), max_tokens.unwrap_or(1)).map_err(RequestError::from)?)
}

/// Runs a request whose prompts are ids now.
pub(crate) async fn run(call: Call, admitted: Admitted, inference: Inference, prompts: Vec<Prompt>) -> Answer {
    let Call { app, caller, record, unsent, .. } = call;
    let Admitted { mut reservation, place } = admitted;
    let Inference { shape, target, n, sampling, streaming, .. } = inference;
    let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    let tokens: usize = ids.iter().map(Vec::len).sum();
    reservation.correct(tokens as u64 * u64::from(n), 0);
    app.metrics.observe_request(n, sampling.max_tokens);
    let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let reply = Reply {
        shape,
        id: format!("{prefix}-{}", new_id()),
        created: unix_time_s() as u64,
        model: target.model,
        text: app.runtime.text().cloned(),
        prompts,
        n: n as usize,
        echo: inference.echo,
        logprobs: inference.logprobs,
        prompt_logprobs: inference.prompt_logprobs,
        return_token_ids: inference.return_token_ids,
        streaming,
    };
    let stops = sampling.stops.clone();
    let wakes_on_token = streaming.is_on;
    let (adapter, account) = (target.adapter, caller.account());
    let start = Start { adapter, account, prompts: ids, n, sampling, wakes_on_token, reservation, place };
    let generation = Generation::start(&app.runtime, app.metrics.clone(), record.clone(), start)?;
    if streaming.is_on {
        stream(&app, record, unsent, generation, reply, stops).await
    } else {
        whole(generation, &reply, &stops).await
    }
}

/// The error that a choice's end is, if it is one.
fn failure(delta: &Delta) -> Option<ApiError> {
    match &delta.end {
        Some(End::Error(error)) => Some(error.clone().into()),
        Some(End::Cancelled) => Some(ApiError::unavailable("the request was cancelled by the server")),
        _ => None,
    }
}

async fn whole(mut generation: Generation, reply: &Reply, stops: &[String]) -> Answer {
    let mut choices: Vec<Collected> = (0..generation.len()).map(|_| Collected::default()).collect();
    while !generation.is_over() {
        for (index, delta) in generation.next().await {
            if let Some(error) = failure(&delta) {
                return Err(error);
            }
            choices[index].add(delta);
        }
    }
    Ok(json_response(&reply.whole(&choices, stops)))
}

/// The headers wait until the engine has taken every choice and its adapter is in host memory, so that a bad adapter or a
/// full queue is an answer of its own and not a broken stream; but not for ever.
async fn stream(
    app: &App,
    record: Arc<Record>,
    unsent: Arc<Unsent>,
    mut generation: Generation,
    reply: Reply,
    stops: Vec<String>,
) -> Answer {
    let limits = &app.config.limits;
    let deadline = tokio::time::Instant::now() + Duration::from_secs_f64(limits.accept_timeout_s);
    let mut is_settled = vec![false; generation.len()];
    let mut early = Vec::new();
    while is_settled.contains(&false) {
        let Ok(deltas) = tokio::time::timeout_at(deadline, generation.next()).await else { break };
        for (index, delta) in deltas {
            if let Some(error) = failure(&delta) {
                return Err(error);
            }
            is_settled[index] |= delta.is_loaded || !delta.pieces.is_empty() || delta.end.is_some();
            early.push((index, delta));
        }
    }
    record.facts().is_stream = true;
    let keep_alive = Duration::from_secs_f64(limits.keep_alive_s);
    let outlet = Outlet { keep_alive, unsent, record, _open: OpenStream::new(app.metrics.clone()) };
    Ok(EventStream::new(reply, stops, generation, early, outlet).response())
}
