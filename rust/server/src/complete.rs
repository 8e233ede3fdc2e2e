//! What both completion routes do once their fields are parsed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use slora_runtime::{Delta, End};

use crate::admission::{Load, Reservation};
use crate::app::{App, Call};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::generation::{Generation, OpenStream, Start};
use crate::log::unix_time_s;
use crate::model_name;
use crate::prompts::{Encoded, PromptInput};
use crate::quota::Place;
use crate::reply::{Collected, Prompt, Reply, Shape};
use crate::sampling::{Sampling, Streaming};
use crate::sse::EventStream;

/// Texts up to this many bytes are tokenized where they are.
const SHORT_BYTES: usize = 1024;
/// How often it is looked whether an adapter has arrived.
const LOOK: Duration = Duration::from_millis(25);

/// A parsed request.
pub(crate) struct Wanted {
    pub shape: Shape,
    pub model: Option<String>,
    pub prompts: Vec<PromptInput>,
    pub sampling: Sampling,
    pub streaming: Streaming,
    pub echo: bool,
    pub logprobs: Option<u32>,
    pub add_special_tokens: Option<bool>,
    pub return_token_ids: bool,
}

/// Reads, parses, admits, runs and answers.
pub(crate) async fn run(
    mut call: Call,
    parse: fn(&App, &mut Fields<'_>) -> Result<Wanted, ApiError>,
) -> Result<Response<Body>, ApiError> {
    let app = call.app.clone();
    let announced = crate::body::announced(&call.headers).unwrap_or(0);
    let tokens = announced.min(u64::from(app.runtime.config().max_context));
    let (bytes, mut reservation) = call.read(Load { requests: 1, tokens, bytes: announced }).await?;
    let wanted = call.parse(bytes, parse).await?;
    wanted.sampling.check(app.runtime.config().vocab_size)?;
    let target = model_name::resolve(&app, &call.caller, wanted.model.clone())?;
    call.record.facts().adapter = target.adapter.clone();
    let place = admit(&app, &call, &wanted, &mut reservation)?;
    let Wanted { shape, prompts, sampling, streaming, echo, logprobs, add_special_tokens, return_token_ids, .. } =
        wanted;
    let encoded = encode(&app, prompts, &sampling, add_special_tokens, echo).await?;
    let num_tokens: usize = encoded.iter().map(|prompt| prompt.ids.len()).sum();
    reservation.correct(num_tokens as u64 * u64::from(sampling.n), 0);
    app.metrics.observe_request(sampling.n, sampling.max_tokens);

    let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let reply = Reply {
        shape,
        id: format!("{prefix}-{}", call.record.id),
        created: unix_time_s() as u64,
        model: target.shown,
        text: app.text.clone(),
        n: sampling.n as usize,
        echo,
        logprobs,
        prompt_logprobs: sampling.params.prompt_logprobs.is_some() && !echo,
        return_token_ids,
        streaming,
        prompts: encoded.into_iter().map(|prompt| Prompt { ids: prompt.ids, text: prompt.text }).collect(),
    };
    let stops = sampling.stops.clone();
    let start = Start {
        adapter: target.adapter.clone(),
        prompts: reply.prompts.iter().map(|prompt| prompt.ids.clone()).collect(),
        sampling,
        wakes_on_token: streaming.is_on,
        reservation,
        place,
    };
    let generation = Generation::start(&app.runtime, app.metrics.clone(), call.record.clone(), start)?;
    if streaming.is_on {
        stream(&app, &call, reply, stops, generation, target.adapter).await
    } else {
        whole(&call, &reply, &stops, generation, target.adapter).await
    }
}

/// The key's quota, and room for every choice.
fn admit(app: &App, call: &Call, wanted: &Wanted, reservation: &mut Reservation) -> Result<Option<Place>, ApiError> {
    let (prompts, n) = (wanted.prompts.len() as u64, u64::from(wanted.sampling.n));
    let max_context = app.runtime.config().max_context;
    let limit = u64::from(app.runtime.config().max_running) + app.config.limits.max_queued_requests as u64;
    if prompts * n > limit {
        let message =
            format!("{prompts} prompts with {n} choices each are more than the {limit} that may be here at once");
        return Err(ApiError::invalid("prompt", message));
    }
    let now = std::time::Instant::now();
    let key = call.caller.key.as_ref();
    let place = key.map(|key| key.usage.enter(&key.quota, (prompts * n) as u32, now)).transpose()?;
    let tokens: u64 = wanted.prompts.iter().map(|prompt| prompt.max_tokens(max_context)).sum();
    reservation.correct(tokens * n, u64::MAX);
    reservation.grow(Load {
        requests: prompts * n - 1,
        tokens: (tokens * n).saturating_sub(reservation.tokens()),
        bytes: 0,
    })?;
    Ok(place)
}

async fn encode(
    app: &Arc<App>,
    prompts: Vec<PromptInput>,
    sampling: &Sampling,
    add_special_tokens: Option<bool>,
    wants_text: bool,
) -> Result<Vec<Encoded>, ApiError> {
    let bytes: usize = prompts.iter().map(PromptInput::text_bytes).sum();
    let is_short = bytes <= SHORT_BYTES && !prompts.iter().any(|prompt| matches!(prompt, PromptInput::Chat(_)));
    let (sampling, max_context) = (sampling.clone(), app.runtime.config().max_context);
    let text = app.text.clone();
    let work = move || {
        let encode = |prompt: PromptInput| {
            let mut encoded = prompt.encode(text.as_deref(), max_context, add_special_tokens, wants_text)?;
            sampling.truncate(&mut encoded.ids, max_context);
            Ok(encoded)
        };
        prompts.into_iter().map(encode).collect::<Result<Vec<_>, _>>()
    };
    if is_short && !wants_text { work() } else { app.text_pool.run(bytes, work).await }
}

async fn whole(
    call: &Call,
    reply: &Reply,
    stops: &[String],
    mut generation: Generation,
    adapter: Option<Arc<str>>,
) -> Result<Response<Body>, ApiError> {
    let mut choices: Vec<Collected> = (0..generation.len()).map(|_| Collected::default()).collect();
    while !generation.is_over() {
        for (index, delta) in generation.next().await {
            check_end(&delta)?;
            choices[index].add(delta);
        }
    }
    let completion_tokens = generation.total_tokens();
    drop(generation);
    let mut response = Response::new(Body::from(reply.whole(&choices, stops).to_string()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("x-prompt-tokens", HeaderValue::from(reply.prompt_tokens()));
    headers.insert("x-generated-tokens", HeaderValue::from(completion_tokens));
    if let Some(value) = adapter.and_then(|name| HeaderValue::from_str(&name).ok()) {
        headers.insert("x-adapter", value);
        headers.insert("x-adapter-version", HeaderValue::from(call.record.facts().version));
    }
    Ok(response)
}

fn check_end(delta: &Delta) -> Result<(), ApiError> {
    match &delta.end {
        Some(End::Error(error)) => Err(error.clone().into()),
        Some(End::Cancelled) => Err(ApiError::unavailable("the request was cancelled by the server")),
        _ => Ok(()),
    }
}

async fn stream(
    app: &Arc<App>,
    call: &Call,
    reply: Reply,
    stops: Vec<String>,
    mut generation: Generation,
    adapter: Option<Arc<str>>,
) -> Result<Response<Body>, ApiError> {
    let early = wait_accepted(app, &mut generation, adapter).await?;
    let keep_alive = crate::server::seconds(app.config.limits.keep_alive_s);
    call.record.facts().is_stream = true;
    let open = OpenStream::new(app.metrics.clone());
    let stream = EventStream::new(reply, stops, generation, early, keep_alive, call.record.clone(), open);
    Ok(stream.response())
}

/// Waits until every choice is in the engine's queue and its adapter in the host tier, or the time is over: what can be
/// refused is an answer with a status then, and no broken stream.
async fn wait_accepted(
    app: &Arc<App>,
    generation: &mut Generation,
    adapter: Option<Arc<str>>,
) -> Result<Vec<(usize, Delta)>, ApiError> {
    let deadline = tokio::time::Instant::now() + crate::server::seconds(app.config.limits.accept_timeout_s);
    let mut early = Vec::new();
    let mut accepted = vec![false; generation.len()];
    let mut is_loaded = adapter.is_none();
    loop {
        let until = deadline.min(tokio::time::Instant::now() + LOOK);
        let until = if accepted.contains(&false) { deadline } else { until };
        match tokio::time::timeout_at(until, generation.next()).await {
            Ok(deltas) => {
                for (index, delta) in deltas {
                    check_end(&delta)?;
                    accepted[index] |= delta.is_accepted;
                    // A token or a natural end: the adapter was there.
                    is_loaded |= delta.was_loaded || !delta.pieces.is_empty() || delta.end.is_some();
                    early.push((index, delta));
                }
            }
            Err(_) if tokio::time::Instant::now() >= deadline => return Ok(early),
            Err(_) => {
                if let Some(name) = &adapter {
                    is_loaded |= app.residency.is_loaded(app, name).await;
                }
            }
        }
        if is_loaded && !accepted.contains(&false) {
            return Ok(early);
        }
    }
}
