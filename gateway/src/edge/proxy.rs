//! Load balancers in front: their addresses, and the clients that they name. Start with [`Proxies`].
//!
//! No other address is trusted: its PROXY header is handled as invalid HTTP, and its `X-Forwarded-For` is ignored.

use std::{io, net::SocketAddr};

use ppp::{v1, v2};
use tokio::{io::Interest, net::TcpStream};

pub use crate::runtime::config::Proxies;

/// Maximum length of a PROXY header, in bytes. Version 1 has at most 107. Version 2 fits addresses of every kind and
/// common additions of load balancers (names, certificate subjects).
const HEADER_LEN_MAX: usize = 2 * 1024;

/// Prefix of a version 1 header, and its maximum length with the line end (section 2.1 of the PROXY protocol).
const V1_BEGINNING: &[u8] = b"PROXY ";
const V1_LEN_MAX: usize = 107;
/// Prefix of a version 2 header, offset of its length, and the bytes before what that counts (section 2.2).
const V2_BEGINNING: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_LEN_AT: usize = 14;
const V2_HEAD_LEN: usize = 16;

/// Why a PROXY header could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the balancer left")]
    Gone(#[source] Option<io::Error>),
    #[error("a trusted address sent no PROXY header, or a damaged one")]
    Malformed,
    #[error("a PROXY header over {HEADER_LEN_MAX} bytes")]
    TooLong,
}

/// Reads a PROXY header, version 1 or 2, and no byte after it. `None`: the load balancer connects for itself, as its
/// health checks do.
///
/// # Errors
/// The header is missing, damaged or too long, or the load balancer left.
pub async fn read_header(tcp: &TcpStream) -> Result<Option<SocketAddr>, ProxyError> {
    let gone = |error| ProxyError::Gone(Some(error));
    let mut header = [0; HEADER_LEN_MAX];
    let mut len = 0;
    loop {
        // There is room: a header that would fill it was rejected as too long.
        let peeked = tcp.peek(&mut header[len..]).await.map_err(gone)?;
        if peeked == 0 {
            return Err(ProxyError::Gone(None));
        }
        match header_in(&header[..len + peeked])? {
            Some((end, source)) => {
                take(tcp, &mut header[len..end]).await.map_err(gone)?;
                return Ok(source);
            }
            // The header does not end in these bytes, so all of them belong to it.
            None => take(tcp, &mut header[len..len + peeked]).await.map_err(gone)?,
        }
        len += peeked;
    }
}

/// End of the header, and the address that it names; `None` while it is incomplete. The end is found here, because the
/// parser confuses some incomplete headers with damaged ones, and the other way round.
fn header_in(bytes: &[u8]) -> Result<Option<(usize, Option<SocketAddr>)>, ProxyError> {
    let may_be = |beginning: &[u8]| bytes.starts_with(beginning) || beginning.starts_with(bytes);
    if may_be(V2_BEGINNING) {
        let Some(&[high, low]) = bytes.get(V2_LEN_AT..V2_HEAD_LEN) else {
            return Ok(None);
        };
        let end = V2_HEAD_LEN + usize::from(u16::from_be_bytes([high, low]));
        if end > HEADER_LEN_MAX {
            return Err(ProxyError::TooLong);
        }
        let Some(header) = bytes.get(..end) else {
            return Ok(None);
        };
        let header = v2::Header::try_from(header).map_err(|_| ProxyError::Malformed)?;
        return Ok(Some((end, source_of_v2(&header))));
    }
    if may_be(V1_BEGINNING) {
        let line = &bytes[..bytes.len().min(V1_LEN_MAX)];
        return match line.iter().position(|&byte| byte == b'\n') {
            Some(last) => {
                let header = v1::Header::try_from(&line[..=last]).map_err(|_| ProxyError::Malformed)?;
                Ok(Some((last + 1, source_of_v1(&header))))
            }
            None if line.len() == V1_LEN_MAX => Err(ProxyError::Malformed),
            None => Ok(None),
        };
    }
    Err(ProxyError::Malformed)
}

fn source_of_v1(header: &v1::Header<'_>) -> Option<SocketAddr> {
    match header.addresses {
        v1::Addresses::Tcp4(pair) => Some((pair.source_address, pair.source_port).into()),
        v1::Addresses::Tcp6(pair) => Some((pair.source_address, pair.source_port).into()),
        v1::Addresses::Unknown => None,
    }
}

fn source_of_v2(header: &v2::Header<'_>) -> Option<SocketAddr> {
    match (header.command, header.addresses) {
        (v2::Command::Proxy, v2::Addresses::IPv4(pair)) => Some((pair.source_address, pair.source_port).into()),
        (v2::Command::Proxy, v2::Addresses::IPv6(pair)) => Some((pair.source_address, pair.source_port).into()),
        (v2::Command::Proxy, v2::Addresses::Unspecified | v2::Addresses::Unix(_)) | (v2::Command::Local, _) => None,
    }
}

/// Reads bytes that were peeked before.
async fn take(tcp: &TcpStream, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        tcp.ready(Interest::READABLE).await?;
        match tcp.try_read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(taken) => bytes = &mut bytes[taken..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::runtime::config::ProxySettings;

    fn proxies(trusted: &[&str]) -> Proxies {
        Proxies::of(&ProxySettings {
            trusted: trusted.iter().map(|&text| text.to_owned()).collect(),
            protocol: true,
            forwarded_for: false,
        })
        .unwrap()
    }

    /// Result of reading these bytes, sent in pieces of `step`, and the remaining bytes.
    async fn read(bytes: &[u8], step: usize) -> (Result<Option<SocketAddr>, ProxyError>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let bytes = bytes.to_vec();
        let sending = tokio::spawn(async move {
            for piece in bytes.chunks(step) {
                // The reader may have stopped.
                if client.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        let outcome = read_header(&server).await;
        let mut rest = Vec::new();
        if outcome.is_ok() {
            server.read_to_end(&mut rest).await.unwrap();
        }
        drop(server);
        sending.await.unwrap();
        (outcome, rest)
    }

    fn v2_header(command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
        bytes.extend_from_slice(&[command, family]);
        bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    #[tokio::test]
    async fn both_versions_name_the_source_and_leave_what_follows() {
        let v2_of_four = [192, 0, 2, 1, 10, 0, 0, 1, 0x1f, 0x90, 0, 80];
        let mut with_extra = v2_of_four.to_vec();
        with_extra.extend_from_slice(&[4, 0, 3, 0, 0, 0]);
        let mut of_six = vec![0; 36];
        of_six[..4].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
        of_six[15] = 1;
        for (header, source) in [
            (
                b"PROXY TCP4 192.0.2.1 10.0.0.1 8080 80\r\n".to_vec(),
                Some("192.0.2.1:8080"),
            ),
            (b"PROXY TCP6 2001:db8::1 ::1 1 80\r\n".to_vec(), Some("[2001:db8::1]:1")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (v2_header(0x21, 0x11, &v2_of_four), Some("192.0.2.1:8080")),
            (v2_header(0x21, 0x11, &with_extra), Some("192.0.2.1:8080")),
            (v2_header(0x21, 0x21, &of_six), Some("[2001:db8::1]:0")),
            (v2_header(0x20, 0x00, &[]), None),
        ] {
            for step in [1, 13, 4096] {
                let mut bytes = header.clone();
                bytes.extend_from_slice(b"\x16\x03GET /\r\n");

                let (outcome, rest) = read(&bytes, step).await;

                assert_eq!(outcome.unwrap(), source.map(|text| text.parse().unwrap()), "{header:?}");
                assert_eq!(rest, b"\x16\x03GET /\r\n");
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_header_is_refused_and_bounded() {
        for bytes in [
            b"GET /v1/connect HTTP/1.1\r\n".to_vec(),
            b"PROXY TCP4 nonsense\r\n".to_vec(),
            [b"PROXY TCP4 ".as_slice(), &[b'1'; 200]].concat(),
            b"\x16\x03\x01\x02\x00\x01\x00".to_vec(),
            v2_header(0x31, 0x11, &[0; 12]),
        ] {
            assert!(
                matches!(read(&bytes, 4096).await.0, Err(ProxyError::Malformed)),
                "{bytes:?}"
            );
        }
        let long = v2_header(0x21, 0x11, &[0; 4096]);
        assert!(matches!(read(&long, 512).await.0, Err(ProxyError::TooLong)));
        assert!(matches!(read(b"PROXY TC", 4096).await.0, Err(ProxyError::Gone(None))));
    }

    #[test]
    fn only_addresses_of_the_list_are_believed() {
        let proxies = proxies(&["10.0.0.0/8", "2001:db8::1"]);

        for (address, is_trusted) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("11.0.0.1", false),
            ("2001:db8::1", true),
            ("2001:db8::2", false),
        ] {
            assert_eq!(proxies.sends_header(address.parse().unwrap()), is_trusted, "{address}");
        }
        assert!(!proxies.forwards("10.0.0.1".parse().unwrap()));
    }
}
