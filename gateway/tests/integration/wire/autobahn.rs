//! The cases of the Autobahn test suite against an echoing device socket: groups 1 to 7 and 10, over TCP and over TLS.
//!
//! kosoku runs the suite's original case files. `./test` installs it and sets `KOSOKU` to it. Without that variable
//! these tests are skipped, and report it.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use seawall_gateway::{
    edge::{head::HeadReader, transport::Transport},
    session::socket::{Inbound, Outbound, Socket, SocketLimits},
};
use serde::Deserialize;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    process::Command,
    time::timeout,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::harness::{authority::Authority, skip::skip_without_program};

/// Groups of cases. 8 is empty; 9 measures throughput with messages of megabytes; 12 and 13 test an extension that is
/// not supported.
const GROUPS: [&str; 8] = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"];
/// Minimum number of cases in these groups.
const CASES_MIN: usize = 240;
/// Maximum time of all of them.
const PATIENCE: Duration = Duration::from_secs(240);

const LIMITS: SocketLimits = SocketLimits {
    frame_len_max: 1 << 20,
    message_len_max: 1 << 20,
    write_timeout: Duration::from_secs(10),
    message_time_max: Duration::from_secs(60),
};

/// Result of one case in the report.
#[derive(Debug, Deserialize)]
struct Verdict {
    behavior: String,
    #[serde(rename = "behaviorClose")]
    behavior_close: String,
}

impl Verdict {
    /// `NON-STRICT` passes as well: invalid UTF-8 is refused, but only once its message is complete.
    fn is_right(&self) -> bool {
        matches!(self.behavior.as_str(), "OK" | "NON-STRICT" | "INFORMATIONAL")
            && matches!(self.behavior_close.as_str(), "OK" | "INFORMATIONAL")
    }
}

/// Upgrades every client, and echoes its messages.
async fn echo(mut stream: Transport) -> Option<()> {
    let key = |head: &seawall_proto::hello::Head<'_>| {
        let key = head
            .headers
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case("Sec-WebSocket-Key"));
        key.map(|(_, key)| derive_accept_key(key))
    };
    let head = HeadReader::new(8 * 1024).read(&mut stream, key).await.ok()?;
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n",
        head.parsed?
    );
    stream.write_all(answer.as_bytes()).await.ok()?;
    stream.flush().await.ok()?;
    let mut socket = Socket::new(stream, &head.leftover, Arc::new(LIMITS));
    loop {
        match socket.next().await {
            Inbound::Text(text) => socket.send(Outbound::Text(text.as_str().to_owned())).await.ok()?,
            Inbound::Binary(bytes) => socket.send(Outbound::Binary(bytes.to_vec())).await.ok()?,
            Inbound::Control => socket.flush().await.ok()?,
            Inbound::Goodbye(_) | Inbound::BadGoodbye => {
                socket.finish().await;
                return Some(());
            }
            Inbound::Broken(close) => {
                socket.fail(&close).await;
                return Some(());
            }
            Inbound::Gone => return None,
        }
    }
}

/// Listens, and passes each connection to `serve`.
async fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = Option<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tcp.set_nodelay(true).unwrap();
            tokio::spawn(serve(tcp));
        }
    });
    address
}

async fn assert_every_case_is_right(address: SocketAddr) {
    let Some(kosoku) = std::env::var_os("KOSOKU") else {
        skip_without_program("KOSOKU names no program: the Autobahn cases are not run");
        return;
    };
    let report = tempfile::tempdir().unwrap();
    let mut command = Command::new(kosoku);
    command.args(["-p", "8", "-o"]).arg(report.path()).kill_on_drop(true);
    for group in GROUPS {
        command.args(["-i", group]);
    }
    let output = timeout(PATIENCE, command.arg(address.to_string()).output())
        .await
        .unwrap()
        .unwrap();

    let verdicts = read(report.path());

    let wrong: BTreeMap<_, _> = verdicts.iter().filter(|(_, verdict)| !verdict.is_right()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(verdicts.len() >= CASES_MIN, "{} cases: {output:?}", verdicts.len());
}

fn read(report: &Path) -> BTreeMap<String, Verdict> {
    let index = std::fs::read(report.join("index.json")).unwrap();
    let agents: BTreeMap<String, BTreeMap<String, Verdict>> = serde_json::from_slice(&index).unwrap();
    agents.into_values().flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_autobahn_case_is_right_over_tcp() {
    let address = listen(|tcp| echo(tcp.into())).await;

    assert_every_case_is_right(address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_autobahn_case_is_right_over_tls() {
    let mut authority = Authority::new();
    let endpoint = Arc::new(authority.endpoint());
    let secure = listen(move |tcp| {
        let endpoint = Arc::clone(&endpoint);
        async move { echo(endpoint.accept_within(tcp, LIMITS.write_timeout).await.ok()?).await }
    })
    .await;
    // The suite uses plain TCP.
    let authority = Arc::new(authority);
    let address = listen(move |mut tcp| {
        let authority = Arc::clone(&authority);
        async move {
            let mut tls = authority.connect(secure, None).await.ok()?;
            copy_bidirectional(&mut tcp, &mut tls).await.ok()?;
            Some(())
        }
    })
    .await;

    assert_every_case_is_right(address).await;
}
