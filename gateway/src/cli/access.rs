//! Access to an API: its address, the token, and the trusted certification authorities.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::{Failure, note};
use crate::edge::tls;

/// Default address of the API, if `SEAWALL_URL` is not set.
pub const DEFAULT_URL: &str = "http://127.0.0.1:8081";
/// Default data directory, if `SEAWALL_DATA_DIR` is not set.
pub const DEFAULT_DATA_DIR: &str = "./seawall-data";

/// Maximum wait for a gateway on this machine to listen, so that a command may follow `seawall serve &` at once.
const START_WAIT_MAX: Duration = Duration::from_secs(3);
/// Pause between two checks whether it listens.
const START_WAIT_STEP: Duration = Duration::from_millis(50);

/// The access token, or why there is none.
pub enum Token {
    Known(String),
    /// Names the places where it was searched.
    Missing(String),
}

/// The certification authorities of a file, else those of the system.
///
/// # Errors
/// The file can't be read, or holds no certificate.
pub fn trust(ca: Option<&Path>) -> Result<TlsConfig, Failure> {
    let authorities: Vec<CertificateDer<'_>> = match ca {
        None => rustls_native_certs::load_native_certs().certs,
        Some(path) => {
            let unusable = |problem: String| Failure::WrongUse(format!("--ca: {}: {problem}", path.display()));
            let pem = fs::read(path).map_err(|error| unusable(error.to_string()))?;
            CertificateDer::pem_slice_iter(&pem)
                .collect::<Result<Vec<_>, _>>()
                .ok()
                .filter(|authorities| !authorities.is_empty())
                .ok_or_else(|| unusable("holds no certificate as PEM".into()))?
        }
    };
    let authorities: Vec<_> = authorities
        .iter()
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(authorities)))
        .unversioned_rustls_crypto_provider(tls::provider())
        .build())
}

/// `SEAWALL_TOKEN`, else `admin.token` in the data directory, else none. The file's token is only sent to the gateway
/// of that directory and to addresses of this machine.
///
/// # Errors
/// The file can't be read, or does not hold a token.
pub fn token(data_dir: Option<&Path>, base: &str, awaits_start: bool) -> Result<Token, Failure> {
    if let Ok(token) = std::env::var("SEAWALL_TOKEN")
        && !token.trim().is_empty()
    {
        if base.starts_with("http://") && !is_of_this_machine(base) {
            note(&format!(
                "warning: SEAWALL_TOKEN crosses the network in clear text to {base}: use https://"
            ));
        }
        return checked(token.trim(), "SEAWALL_TOKEN").map(Token::Known);
    }
    let folder = data_dir.unwrap_or(Path::new(DEFAULT_DATA_DIR));
    let path = folder.join("admin.token");
    if !is_of_this_machine(base) && !is_ops_address_of(folder, base) {
        return Ok(Token::Missing(format!(
            "no token for {base}: set SEAWALL_TOKEN. The token in {} is only sent to the gateway of that directory",
            path.display()
        )));
    }
    if awaits_start && !path.exists() {
        // The first start of a gateway creates the file before it listens.
        await_start(base);
    }
    match fs::read_to_string(&path) {
        Ok(token) => checked(token.trim(), &path.display().to_string()).map(Token::Known),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Token::Missing(format!(
            "no token: SEAWALL_TOKEN is not set, and {} does not exist (--data-dir names the gateway's data directory)",
            path.display()
        ))),
        Err(error) => Err(Failure::failed(format!("{}: {error}", path.display()))),
    }
}

/// Host and port of an API address.
fn authority(base: &str) -> &str {
    let rest = base.split_once("://").map_or(base, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// Whether an API address is a loopback address.
fn is_of_this_machine(base: &str) -> bool {
    let authority = authority(base);
    let host = authority.rsplit_once(':').map_or(authority, |(host, port)| {
        if port.bytes().all(|byte| byte.is_ascii_digit()) {
            host
        } else {
            authority
        }
    });
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Returns the socket addresses of an API on loopback; none elsewhere. `localhost` may have two, of which the gateway
/// has one.
fn loopback_addresses(base: &str) -> Vec<SocketAddr> {
    if !is_of_this_machine(base) {
        return Vec::new();
    }
    authority(base)
        .to_socket_addrs()
        .map_or_else(|_| Vec::new(), Iterator::collect)
}

/// Whether the data directory names this address as its gateway's API.
fn is_ops_address_of(data_dir: &Path, base: &str) -> bool {
    let Ok(text) = fs::read_to_string(data_dir.join("addresses.json")) else {
        return false;
    };
    serde_json::from_str::<Value>(&text).is_ok_and(|addresses| {
        addresses.get("ops").and_then(Value::as_str) == Some(authority(base)) && base.starts_with("https://")
    })
}

/// Checks that a token can be a header value.
fn checked(token: &str, source: &str) -> Result<String, Failure> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::failed(format!("{source} does not hold a token")));
    }
    Ok(token.to_owned())
}

/// Waits until a gateway on this machine listens, for at most 3 s. Elsewhere a refused connection is final.
pub fn await_start(base: &str) {
    let addresses = loopback_addresses(base);
    if addresses.is_empty() {
        return;
    }
    let end = Instant::now() + START_WAIT_MAX;
    while TcpStream::connect(&addresses[..]).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        && Instant::now() < end
    {
        std::thread::sleep(START_WAIT_STEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_of_a_data_directory_is_only_sent_to_its_gateway() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("admin.token"), "secret\n").unwrap();
        fs::write(
            home.path().join("addresses.json"),
            r#"{"devices":"0.0.0.0:1","ops":"192.0.2.7:8081"}"#,
        )
        .unwrap();
        let is_sent_to = |base: &str| matches!(token(Some(home.path()), base, false).unwrap(), Token::Known(_));

        for own in [
            "http://127.0.0.1:8081",
            "http://localhost:1",
            "https://[::1]:8081",
            "https://192.0.2.7:8081",
        ] {
            assert!(is_sent_to(own), "{own}");
        }
        for other in [
            "http://192.0.2.7:8081",
            "https://gw-7.example",
            "http://127.0.0.1.example:8081",
            "http://localhost.example",
        ] {
            assert!(!is_sent_to(other), "{other}");
        }
    }

    #[test]
    fn command_waits_for_a_gateway_of_this_machine_that_does_not_listen_yet() {
        let address = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();

        let starts_late = std::thread::spawn(move || {
            std::thread::sleep(START_WAIT_STEP * 4);
            std::net::TcpListener::bind(address).unwrap()
        });
        await_start(&format!("http://{address}"));

        assert!(
            TcpStream::connect(address).is_ok(),
            "it listens when the command continues"
        );
        drop(starts_late.join().unwrap());
    }

    #[test]
    fn every_address_of_localhost_is_tried() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();

        let addresses = loopback_addresses(&format!("http://localhost:{port}"));

        assert!(
            addresses.contains(&SocketAddr::from(([127, 0, 0, 1], port))),
            "{addresses:?}"
        );
        // As where the first address of `localhost` is IPv6's.
        let began = Instant::now();
        await_start(&format!("http://localhost:{port}"));
        assert!(began.elapsed() < START_WAIT_MAX / 2);
        assert_eq!(loopback_addresses("http://gw-7.example:8081"), []);
    }

    #[test]
    fn missing_token_is_said_with_the_place_where_it_was_looked_for() {
        let home = tempfile::tempdir().unwrap();

        let Token::Missing(reason) = token(Some(home.path()), DEFAULT_URL, false).unwrap() else {
            panic!("there is no file");
        };

        assert!(
            reason.contains("SEAWALL_TOKEN is not set") && reason.contains("admin.token does not exist"),
            "{reason}"
        );
    }
}
