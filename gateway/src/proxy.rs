//! Balancers in front: which addresses are theirs, and whom they say a connection comes from. Start with [`Proxies`].
//!
//! Nobody else is believed: a PROXY header from any other address is no HTTP, and its `X-Forwarded-For` is not looked at.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::{IpNet, Ipv4Net};
use ppp::{v1, v2};
use tokio::{io::Interest, net::TcpStream};

use crate::config::ProxySettings;

/// Longest PROXY header taken, in bytes. Version 1 has 107 at most; version 2 fits addresses of every kind and what balancers
/// add to them (names, certificates' subjects) with room to spare.
const HEADER_LEN_MAX: usize = 2 * 1024;

/// How a header of version 1 begins, and how long it may be with its line's end (section 2.1 of the PROXY protocol).
const V1_BEGINNING: &[u8] = b"PROXY ";
const V1_LEN_MAX: usize = 107;
/// How a header of version 2 begins, where its length stands, and what that counts from (section 2.2).
const V2_BEGINNING: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_LEN_AT: usize = 14;
const V2_HEAD_LEN: usize = 16;

/// Bits in front of an IPv4 address that is written as IPv6 (RFC 4291 §2.5.5.2).
const MAPPED_PREFIX_LEN: u8 = 96;

/// The balancers that are believed, and what they say.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    trusted: Vec<IpNet>,
    speaks_proxy: bool,
    forwards: bool,
}

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

impl Proxies {
    /// # Errors
    /// An element of `proxy.trusted` that is neither an address nor a network.
    pub fn of(settings: &ProxySettings) -> Result<Self, String> {
        let network = |text: &String| {
            text.parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
                .map(canonical)
                .map_err(|_| format!("{text:?} is neither an address nor a network such as 10.0.0.0/8"))
        };
        Ok(Self {
            trusted: settings.trusted.iter().map(network).collect::<Result<_, _>>()?,
            speaks_proxy: settings.protocol,
            forwards: settings.forwarded_for,
        })
    }

    /// Whether a connection from here comes from somebody else, who is still to be named.
    #[must_use]
    pub fn speaks_for_others(&self, address: IpAddr) -> bool {
        (self.speaks_proxy || self.forwards) && self.is_trusted(address)
    }

    /// Whether a connection from here begins with a PROXY header.
    #[must_use]
    pub fn sends_header(&self, address: IpAddr) -> bool {
        self.speaks_proxy && self.is_trusted(address)
    }

    /// Whether `X-Forwarded-For` of a request from here is believed.
    #[must_use]
    pub fn forwards(&self, address: IpAddr) -> bool {
        self.forwards && self.is_trusted(address)
    }

    #[must_use]
    pub fn is_trusted(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|network| network.contains(&address))
    }
}

/// A network of IPv4 addresses that was written as IPv6 (`::ffff:10.0.0.0/104`), as IPv4: so connections are compared.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let network_of = |address: Ipv4Addr| {
        let len = mapped.prefix_len().checked_sub(MAPPED_PREFIX_LEN)?;
        Ipv4Net::new(address, len).ok().map(IpNet::V4)
    };
    mapped.addr().to_ipv4_mapped().and_then(network_of).unwrap_or(network)
}

/// Reads a PROXY header, version 1 or 2, and not a byte of what follows. `None`: the balancer speaks for itself, as its
/// health checks do.
///
/// # Errors
/// There is none, or it is damaged or too long, or the balancer left.
pub async fn read_header(tcp: &TcpStream) -> Result<Option<SocketAddr>, ProxyError> {
    let gone = |error| ProxyError::Gone(Some(error));
    let mut header = [0; HEADER_LEN_MAX];
    let mut len = 0;
    loop {
        // There is room: a header that would fill it has been told too long.
        let peeked = tcp.peek(&mut header[len..]).await.map_err(gone)?;
        if peeked == 0 {
            return Err(ProxyError::Gone(None));
        }
        match header_in(&header[..len + peeked])? {
            Some((end, source)) => {
                take(tcp, &mut header[len..end]).await.map_err(gone)?;
                return Ok(source);
            }
            // It does not end in here, so that all of this is of the header.
            None => take(tcp, &mut header[len..len + peeked]).await.map_err(gone)?,
        }
        len += peeked;
    }
}

/// Where the header ends and whom it names; `None` while it is incomplete. Its end is found here, since the parser takes some
/// incomplete headers for damaged ones, and damaged ones for incomplete.
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

/// Takes bytes that have been seen to be there.
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

    #[test]
    fn ipv4_balancer_may_be_written_as_ipv6() {
        for (trusted, address, is_trusted) in [
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.1", true),
            ("::ffff:10.0.0.1", "10.0.0.2", false),
            ("::ffff:10.0.0.0/104", "10.9.8.7", true),
            ("::ffff:10.0.0.0/104", "11.0.0.1", false),
            ("::ffff:0:0/96", "192.0.2.1", true),
            ("::ffff:0:0/96", "2001:db8::1", false),
            ("2001:db8::/32", "2001:db8::1", true),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
        ] {
            let proxies = Proxies::of(&ProxySettings {
                trusted: vec![trusted.to_owned()],
                ..ProxySettings::default()
            })
            .unwrap();

            assert_eq!(
                proxies.is_trusted(address.parse().unwrap()),
                is_trusted,
                "{trusted} {address}"
            );
        }
    }

    fn proxies(trusted: &[&str]) -> Proxies {
        Proxies::of(&ProxySettings {
            trusted: trusted.iter().map(|&text| text.to_owned()).collect(),
            protocol: true,
            forwarded_for: false,
        })
        .unwrap()
    }

    /// What is read of these bytes, sent in pieces of `step`, and what is left behind.
    async fn read(bytes: &[u8], step: usize) -> (Result<Option<SocketAddr>, ProxyError>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let bytes = bytes.to_vec();
        let sending = tokio::spawn(async move {
            for piece in bytes.chunks(step) {
                // The reader may have given up.
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
