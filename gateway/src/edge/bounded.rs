//! TCP below a TLS handshake, with a maximum number of bytes. Start with [`Bounded`].

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A TCP connection that fails once more than its bound was read. The bound is [lifted](Self::lift) after the
/// handshake.
///
/// rustls keeps up to 64 KiB of handshake messages until they are complete, and any client can send such messages.
#[derive(Debug)]
pub struct Bounded {
    tcp: TcpStream,
    /// Bytes that may still be read. The read that exceeds it is the last.
    left: usize,
    /// Bytes that the kernel has accepted. Wraps.
    written: u64,
}

impl Bounded {
    pub const fn new(tcp: TcpStream, len_max: usize) -> Self {
        Self {
            tcp,
            left: len_max,
            written: 0,
        }
    }

    /// Bytes that the kernel has accepted so far. Wraps.
    #[must_use]
    pub const fn written(&self) -> u64 {
        self.written
    }

    fn note_written(&mut self, polled: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(len)) = polled {
            self.written = self.written.wrapping_add(*len as u64);
        }
    }

    /// Removes the bound after the handshake.
    pub const fn lift(&mut self) {
        self.left = usize::MAX;
    }

    #[must_use]
    pub const fn tcp(&self) -> &TcpStream {
        &self.tcp
    }
}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
        if self.left == usize::MAX {
            return Poll::Ready(Ok(()));
        }
        match self.left.checked_sub(buf.filled().len() - before) {
            Some(left) => {
                self.left = left;
                Poll::Ready(Ok(()))
            }
            None => Poll::Ready(Err(io::Error::other("the handshake is longer than the maximum"))),
        }
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write(cx, buf);
        self.note_written(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs);
        self.note_written(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
