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
    bare::{self, Dressed},
    call::Origin,
    places::Places,
    problem::{Code, Problem},
    router,
};
use crate::{socket::drain, state::Shared, tls::NoTls, transport::Transport};

/// Time for the head of a request, and for the next request on a connection that is kept. Then the connection is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time for which a peer may acknowledge nothing. Then its connection is closed.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);
/// Send buffer of a connection in the kernel, in bytes; Linux takes twice as much. Without a bound a peer that does not read costs
/// up to 4 MiB.
const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// Greatest head of a request.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Time for answers and changes under way when the gateway ends: less than it has itself.
const END_MAX: Duration = Duration::from_millis(1_500);
/// What is still read from a client that speaks no TLS, and for how long.
const LINGER_LEN_MAX: usize = 64 * 1024;
const LINGER_TIME: Duration = Duration::from_millis(500);
/// Wait after a failed accept (too many open files), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves the API until `stop`; requests under way are answered, streams end, and changes under way are made.
///
/// All of that has [`END_MAX`]; what is left then ends with the process.
pub async fn serve(listener: TcpListener, state: Shared, stop: CancellationToken) {
    let places = Places::new(state.config.ops.connections_max);
    let api = Api::new(state, stop.clone());
    let router = router(&api);
    let connections = TaskTracker::new();
    loop {
        let accepted = stop
            .run_until_cancelled(async {
                let (stream, _) = listener.accept().await?;
                // While every place is taken, others wait in the backlog.
                Ok::<_, std::io::Error>((stream, places.take().await))
            })
            .await;
        match accepted {
            None => break,
            Some(Ok((stream, place))) => {
                let router = TowerToHyperService::new(router.clone());
                let (stop, api) = (stop.clone(), Arc::clone(&api));
                connections.spawn(async move {
                    let place = Arc::new(place);
                    let origin = Origin {
                        place: Arc::clone(&place),
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
                            api.state.note_panic("the task of an API connection");
                        },
                        () = place.evicted() => tracing::debug!("an idle API connection made way"),
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
        tracing::debug!("API requests were under way at the end");
    }
}

/// The connection with TLS on it, where this listener speaks that.
async fn secured(state: &Shared, tcp: TcpStream) -> Option<Transport> {
    let Some(endpoint) = &state.tls.ops else {
        return Some(tcp.into());
    };
    match endpoint.accept_within(tcp, state.config.tls.handshake_timeout()).await {
        Ok(stream) => Some(stream),
        Err(NoTls::Plain(mut tcp)) => {
            let problem = Problem::new(Code::BadRequest, "TLS is spoken here: use https://");
            if tcp.write_all(&bare::written_out(problem)).await.is_ok() {
                drain(&mut tcp.into(), LINGER_LEN_MAX, LINGER_TIME).await;
            }
            None
        }
        Err(NoTls::Silent) => None,
        Err(NoTls::Failed(error)) => {
            tracing::debug!(%error, "a TLS handshake of the API failed");
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
        tracing::debug!(%error, "an API connection could not be tuned");
    }
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(Dressed::new(stream)), service);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an API connection ended");
    }
}
