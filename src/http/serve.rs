//! Connections: accepted up to a bound, given to the routes, and let finish at the end.

use super::tls::{H2, Tls};
use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::future::{Future, pending};
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tower::Service;
use tower_http::timeout::TimeoutBody;

/// Bytes of a request's head; HTTP/1 counts what it has read, which may be up to twice as much.
const HEAD_BYTES_MAX: u32 = 64 << 10;
/// Requests at the same time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 128;
/// How often an HTTP/2 client must show that it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Pause after the system refused a connection, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// What a connection may take.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Open connections; further ones wait in the system's backlog.
    pub connections: usize,
    /// Time for a TLS handshake.
    pub handshake: Duration,
    /// Time for the head of a request, counted from the end of the one before: it also ends an idle connection.
    pub head: Duration,
    /// Time between two pieces of a request's body.
    pub body_stall: Duration,
    /// Time in which a client that is sent something takes none of it.
    pub write_stall: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        // Load balancers keep idle connections for 60 s and count on the server to keep them longer.
        let (handshake, head) = (Duration::from_secs(10), Duration::from_secs(75));
        Self {
            connections: 4096,
            handshake,
            head,
            body_stall: Duration::from_secs(30),
            write_stall: Duration::from_secs(60),
        }
    }
}

/// How bytes travel: over TLS if given, within limits.
#[derive(Clone, Debug, Default)]
pub struct Transport {
    pub tls: Option<Tls>,
    pub limits: ConnectionLimits,
}

/// Serves `app` on `listener` over HTTP/1.1, or, with TLS, whichever of HTTP/1.1 and HTTP/2 the client prefers.
///
/// When `shutdown` resolves, the listener and idle connections are closed, requests that have begun finish, and then
/// this returns. Dropped, it cuts every connection.
pub async fn serve(listener: TcpListener, app: Router, transport: Transport, shutdown: impl Future<Output = ()>) {
    let connections_max = transport.limits.connections;
    let transport = Arc::new(transport);
    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => report(ended),
            stream = accept(&listener), if connections.len() < connections_max => {
                connections.spawn(connection(stream, app.clone(), transport.clone(), stopping.clone()));
                if connections.len() == connections_max {
                    tracing::warn!(connections_max, "the limit of open connections is reached: more have to wait");
                }
            }
        }
    }
    drop(listener);
    stop.send_replace(());
    while let Some(ended) = connections.join_next().await {
        report(ended);
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // Of one client, who left before it was accepted.
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn report(ended: Result<(), JoinError>) {
    // Panics in handlers are caught in the layers; this is one in a response's body.
    if let Err(error) = ended {
        tracing::error!(%error, "a connection failed");
    }
}

async fn connection(stream: TcpStream, app: Router, transport: Arc<Transport>, mut stopping: watch::Receiver<()>) {
    // Tokens are small and late ones useless: do not wait to fill packets.
    let _ = stream.set_nodelay(true);
    let limits = transport.limits;
    let Some(tls) = &transport.tls else {
        return http(stream, false, app, limits, stopping).await;
    };
    let handshake = tokio::select! {
        _ = stopping.changed() => return,
        handshake = timeout(limits.handshake, tls.0.accept(stream)) => handshake,
    };
    match handshake {
        Ok(Ok(stream)) => {
            let h2 = stream.get_ref().1.alpn_protocol() == Some(H2);
            http(stream, h2, app, limits, stopping).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

/// Speaks HTTP on a connection until it ends.
async fn http<S>(stream: S, h2: bool, app: Router, limits: ConnectionLimits, mut stopping: watch::Receiver<()>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let begun = Arc::new(AtomicBool::new(false));
    let service = service_fn({
        let begun = begun.clone();
        move |request: Request<Incoming>| {
            begun.store(true, Ordering::Relaxed);
            let body = |body| Body::new(TimeoutBody::new(limits.body_stall, body));
            app.clone().call(request.map(body))
        }
    });
    // HTTP/1 times every head by itself; a silent HTTP/2 client would be waited for.
    let silent = async {
        sleep(limits.head).await;
        if begun.load(Ordering::Relaxed) {
            pending::<()>().await;
        }
    };
    let builder = builder(h2, &limits);
    // Who does not read holds the memory of what it is sent.
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write_stall));
    let stream = Box::pin(stream);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = silent => return,
        _ = stopping.changed() => {
            if !begun.load(Ordering::Relaxed) {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended early");
    }
}

fn builder(h2: bool, limits: &ConnectionLimits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    let buffer = HEAD_BYTES_MAX as usize;
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.head).max_buf_size(buffer);
    let mut two = builder.http2();
    two.timer(TokioTimer::new()).keep_alive_interval(PING_INTERVAL).keep_alive_timeout(PING_INTERVAL);
    two.max_header_list_size(HEAD_BYTES_MAX).max_concurrent_streams(STREAMS_MAX);
    if h2 { builder.http2_only() } else { builder.http1_only() }
}
