//! What a device's bytes travel over: TCP, or TLS on it. Start with [`Transport`].
//!
//! One enum instead of a trait object, so that plain TCP costs nothing for TLS being there: neither a byte of memory nor an
//! indirect call. What only TLS needs stands in a box.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use crate::tls::Bounded;

/// A device's connection.
#[derive(Debug)]
pub enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<Bounded>>),
}

impl Transport {
    /// The connection under it, to ask the kernel about; never to read from.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0.tcp(),
        }
    }

    /// Whether the peer has sent anything that was not read yet.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        has_unread(self.tcp())
    }

    /// Whether the peer has left, as far as the kernel knows now.
    #[must_use]
    pub fn has_left(&self) -> bool {
        has_left(self.tcp())
    }

    /// Bytes that the kernel has taken from TLS so far, which keeps what it was given. Plain TCP keeps nothing: 0.
    #[must_use]
    pub fn written_by_tls(&self) -> u64 {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(tls) => tls.get_ref().0.written(),
        }
    }

    /// Ends the connection with a reset. What the kernel holds for a peer that does not read is freed at once.
    pub fn abort(self) {
        // A connection that is gone has nothing to free.
        let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
    }

    /// Says goodbye where the transport has a word for it: TLS does (RFC 8446 §6.1), and a peer that does not hear it must take
    /// what came before for cut off. Closing ends plain TCP by itself.
    pub async fn say_goodbye(&mut self) {
        if let Self::Tls(tls) = self {
            // A peer that is gone needs none.
            let _ = tls.shutdown().await;
        }
    }
}

/// Whether the peer has sent anything that was not read yet. Asks the kernel, since the runtime may not have looked at this
/// socket yet.
#[must_use]
pub fn has_unread(tcp: &TcpStream) -> bool {
    let peeked = SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]);
    peeked.is_ok_and(|len| len > 0)
}

impl From<TlsStream<Bounded>> for Transport {
    /// Takes over when the handshake is over.
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

/// Whether the peer has closed or broken the connection. Asks the kernel, since the runtime may not have looked at this socket
/// yet. A peer that has closed its side behind bytes that nobody has read is still there.
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
