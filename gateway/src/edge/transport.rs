//! Transport of a device's connection: TCP, or TLS over it. Start with [`Transport`].
//!
//! One enum instead of a trait object, so that TLS costs plain TCP neither memory nor an indirect call. The TLS state
//! is boxed.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;

use seawall_proto::session::KernelView;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use crate::edge::bounded::Bounded;

/// Event that shows that the client has left, even if it has unread data: on Linux, waiting for priority data also
/// reports the end of the stream. Elsewhere, only a broken connection is visible behind unread data.
#[cfg(target_os = "linux")]
const LEFT: Interest = Interest::PRIORITY.add(Interest::ERROR);
#[cfg(not(target_os = "linux"))]
const LEFT: Interest = Interest::ERROR;

/// A device's connection.
#[derive(Debug)]
pub enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<Bounded>>),
}

impl Transport {
    /// The TCP connection, for queries to the kernel. Never read from it.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0.tcp(),
        }
    }

    /// Whether the client has sent data that was not read yet.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        has_unread(self.tcp())
    }

    /// What the kernel knows of the connection: whether it holds unread bytes, and when the last ones came.
    #[must_use]
    pub fn kernel_view(&self) -> KernelView {
        let tcp = self.tcp();
        let timing = timing(tcp);
        KernelView {
            has_unread: has_unread(tcp),
            last_data: timing.map(|timing| timing.last_data),
            round_trip: timing.map(|timing| timing.round_trip),
        }
    }

    /// Time since anything came from the client's machine, be it the acknowledgement of a probe. `None` where the
    /// kernel does not tell.
    #[must_use]
    pub fn last_segment(&self) -> Option<Duration> {
        timing(self.tcp()).map(|timing| timing.last_data.min(timing.last_ack))
    }

    /// Whether the client has left, as far as the kernel knows.
    #[must_use]
    pub fn has_left(&self) -> bool {
        has_left(self.tcp())
    }

    /// Ready once the client has closed its side or broken the connection. A client that sends more data is still
    /// there.
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    pub async fn peer_gone(&self) {
        let tcp = self.tcp();
        if let Ok(1..) = tcp.peek(&mut [0]).await {
            // An error here is an error of the connection.
            let _ = tcp.ready(LEFT).await;
        }
    }

    /// Bytes that the kernel has accepted from TLS so far, which buffers them. Plain TCP has no buffer: 0.
    #[must_use]
    pub fn written_by_tls(&self) -> u64 {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(tls) => tls.get_ref().0.written(),
        }
    }

    /// Closes the connection with a reset. The kernel frees the data for a client that does not read at once.
    pub fn abort(self) {
        self.reset_at_end();
    }

    /// Makes the close of the connection a reset, whenever it happens.
    pub fn reset_at_end(&self) {
        // A connection that is gone has nothing to free.
        let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
    }

    /// Bounds the time for which the kernel keeps unacknowledged data, even after the connection was closed
    /// (`TCP_USER_TIMEOUT`).
    pub fn keep_unacknowledged_for(&self, time_max: Duration) {
        // A connection that is gone keeps nothing.
        let _ = SockRef::from(self.tcp()).set_tcp_user_timeout(Some(time_max));
    }

    /// Sends the close message of the transport, if it has one. TLS does (RFC 8446 §6.1): without it the client must
    /// treat the data before as truncated. Plain TCP needs none.
    pub async fn say_goodbye(&mut self) {
        if let Self::Tls(tls) = self {
            // A client that has left needs none.
            let _ = tls.shutdown().await;
        }
    }
}

/// Whether the client has sent data that was not read yet. Queries the kernel, because the runtime may not have checked
/// this socket yet.
#[must_use]
pub fn has_unread(tcp: &TcpStream) -> bool {
    let peeked = SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]);
    peeked.is_ok_and(|len| len > 0)
}

/// What the kernel knows of a connection's times (`TCP_INFO`).
#[derive(Clone, Copy)]
struct Timing {
    /// Time since the last data came in.
    last_data: Duration,
    /// Time since the last acknowledgement came in.
    last_ack: Duration,
    /// Smoothed round-trip time.
    round_trip: Duration,
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "no safe wrapper of TCP_INFO exists")]
fn timing(tcp: &TcpStream) -> Option<Timing> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the descriptor is open for as long as `tcp` is borrowed, and the kernel writes at most `len` bytes into
    // `info`.
    let asked = unsafe {
        libc::getsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if asked != 0 {
        return None;
    }
    // SAFETY: a struct of integers, all of whose bytes were zero before the kernel wrote some of them.
    let info = unsafe { info.assume_init() };
    Some(Timing {
        last_data: Duration::from_millis(info.tcpi_last_data_recv.into()),
        last_ack: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
    })
}

/// Only Linux tells.
#[cfg(not(target_os = "linux"))]
const fn timing(_: &TcpStream) -> Option<Timing> {
    None
}

impl From<TlsStream<Bounded>> for Transport {
    /// Lifts the bound after the handshake.
    fn from(mut tls: TlsStream<Bounded>) -> Self {
        tls.get_mut().0.lift();
        Self::Tls(Box::new(tls))
    }
}

impl From<TcpStream> for Transport {
    fn from(tcp: TcpStream) -> Self {
        Self::Plain(tcp)
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

/// Whether the client has closed or broken the connection. Queries the kernel, because the runtime may not have checked
/// this socket yet. A client that closed its side behind unread data is still there.
fn has_left(tcp: &TcpStream) -> bool {
    let socket = SockRef::from(tcp);
    match socket.peek(&mut [MaybeUninit::uninit()]) {
        Ok(0) => true,
        Ok(_) => !matches!(socket.take_error(), Ok(None)),
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tcp_is_no_larger_for_tls_being_there() {
        assert_eq!(size_of::<Transport>(), size_of::<TcpStream>());
    }
}
