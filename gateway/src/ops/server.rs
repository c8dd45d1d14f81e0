//! The listener of the API: HTTP/1.1 on hyper, with bounds on connections, heads and readers that stopped reading.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use hyper::{Request, body::Incoming, server::conn::http1, service::Service as _};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Api,
    call::Origin,
    hyper_errors::{self, RewriteErrors},
    permits::Permits,
    problem::{Code, Problem},
    router,
};
use crate::{
    edge::{tls::NoTls, transport::Transport},
    node::Shared,
    session::socket::drain,
};

/// Maximum time for the head of a request, and between two requests. Then the connection is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time without an acknowledgement from the peer (`TCP_USER_TIMEOUT`). Then its connection is closed.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);
/// Kernel send buffer of a connection, in bytes. Linux doubles it. Without a bound, a peer that does not read costs up
/// to 4 MiB.
const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// Maximum size of a request head, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Maximum time for running calls and changes when the gateway stops. It is less than the gateway itself has.
const END_MAX: Duration = Duration::from_millis(1_500);
/// Maximum size, in bytes, and time of data that is read from a client that does not use TLS, after the answer.
const LINGER_LEN_MAX: usize = 64 * 1024;
const LINGER_TIME: Duration = Duration::from_millis(500);
/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves the API until `stop`. Running requests are then answered, streams end, and running changes are completed.
///
/// All of that has [`END_MAX`]. The rest ends with the process.
pub async fn serve(listener: TcpListener, state: Shared, stop: CancellationToken) {
    let permits = Permits::new(state.config.ops.connections_max);
    let api = Api::new(state, stop.clone());
    let router = router(&api);
    let connections = TaskTracker::new();
    loop {
        let accepted = stop
            .run_until_cancelled(async {
                let (stream, _) = listener.accept().await?;
                // While all permits are taken, further connections wait in the backlog.
                Ok::<_, std::io::Error>((stream, permits.acquire().await))
            })
            .await;
        match accepted {
            None => break,
            Some(Ok((stream, permit))) => {
                let router = TowerToHyperService::new(router.clone());
                let (stop, api) = (stop.clone(), Arc::clone(&api));
                connections.spawn(async move {
                    let permit = Arc::new(permit);
                    let origin = Origin {
                        permit: Arc::clone(&permit),
                        is_loopback: stream
                            .local_addr()
                            .is_ok_and(|local| local.ip().to_canonical().is_loopback()),
                    };
                    let life = async {
                        if let Some(stream) = secured(&api.state, stream).await {
                            connection(stream, router, origin, stop).await;
                        }
                    };
                    let life = AssertUnwindSafe(life).catch_unwind();
                    tokio::select! {
                        ended = life => if ended.is_err() {
                            api.state.panics.count("the task of an API connection");
                        },
                        () = permit.evicted() => tracing::debug!("idle API connection evicted"),
                    }
                });
            }
            Some(Err(error)) => {
                api.state.metrics.accept_pauses.increment(1);
                tracing::warn!(%error, "accepting an API connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    api.tasks.close();
    let ended = async {
        connections.wait().await;
        api.tasks.wait().await;
    };
    if tokio::time::timeout(END_MAX, ended).await.is_err() {
        tracing::debug!("API requests cut off at the end");
    }
}

/// Completes the TLS handshake if this listener has TLS. `None`: the connection has ended.
async fn secured(state: &Shared, tcp: TcpStream) -> Option<Transport> {
    let Some(endpoint) = &state.tls.ops else {
        return Some(tcp.into());
    };
    match endpoint.accept_within(tcp, state.config.tls.handshake_timeout()).await {
        Ok(stream) => Some(stream),
        Err(NoTls::Plain(mut tcp)) => {
            let problem = Problem::new(Code::BadRequest, "this port uses TLS: use https://");
            if tcp.write_all(&hyper_errors::written_out(problem)).await.is_ok() {
                drain(&mut tcp.into(), LINGER_LEN_MAX, LINGER_TIME).await;
            }
            None
        }
        Err(NoTls::Silent) => None,
        Err(NoTls::Failed(error)) => {
            tracing::debug!(%error, "API TLS handshake failed");
            None
        }
    }
}

async fn connection(
    stream: Transport,
    router: TowerToHyperService<axum::Router>,
    origin: Origin,
    stop: CancellationToken,
) {
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(origin.clone());
        router.call(request)
    });
    let socket = SockRef::from(stream.tcp());
    let tuned = socket
        .set_tcp_nodelay(true)
        .and_then(|()| socket.set_send_buffer_size(SEND_BUFFER_BYTES))
        .and_then(|()| socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX)));
    if let Err(error) = tuned {
        tracing::debug!(%error, "API socket options not set");
    }
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(RewriteErrors::new(stream)), service);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "API connection failed");
    }
}
