//! Metrics over HTTP: `GET /metrics`.
//!
//! Whoever asks is read for a few seconds and gets one answer at a time; only so many are served at once, so that nobody
//! who holds connections open has the session run out of descriptors.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Exposition;
use super::negotiate::Format;

/// Where metrics are.
const PATH: &str = "/metrics";
/// How many are served at once; others wait.
const MOST: usize = 64;
/// How long somebody may take to ask, from one answer to the next question as well: longer than Prometheus's usual
/// minute between scrapes.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long after a failure to take a connection the next is tried.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves what `expose` tells, for as long as it is polled. Needs to run in a [`tokio::task::LocalSet`].
pub async fn serve(listener: TcpListener, expose: impl Fn() -> Exposition + 'static) {
    let expose = Rc::new(expose);
    let room = Rc::new(Semaphore::new(MOST));
    loop {
        // It is never closed.
        let Ok(_) = room.acquire().await.map(|place| place.forget()) else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (expose, room) = (expose.clone(), room.clone());
                tokio::task::spawn_local(async move {
                    if let Err(err) = converse(stream, &*expose).await {
                        tracing::debug!(%from, %err, "a reader of metrics");
                    }
                    room.add_permits(1);
                });
            }
            Err(err) => {
                room.add_permits(1);
                tracing::warn!(%err, "a reader of metrics cannot be served");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, expose: &impl Fn() -> Exposition) -> hyper::Result<()> {
    let service = service_fn(|request: Request<Incoming>| async move { Ok::<_, Infallible>(answer(&request, expose)) });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn answer(request: &Request<Incoming>, expose: &impl Fn() -> Exposition) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let say = |status, text: &'static str| response(status, PLAIN, text.into());
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut refusal = say(StatusCode::METHOD_NOT_ALLOWED, "metrics are read with GET\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match request.uri().path() {
        PATH => {
            let accept = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
            let format = Format::wanted(&accept.collect::<Vec<_>>().join(","));
            let text = match format {
                Format::OpenMetrics => expose().openmetrics(),
                Format::Text => expose().text(),
            };
            response(StatusCode::OK, format.content_type(), text.into())
        }
        "/" => say(StatusCode::OK, "criu-ebpf tracks a process tree; its metrics are at /metrics\n"),
        _ => say(StatusCode::NOT_FOUND, "metrics are at /metrics\n"),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
