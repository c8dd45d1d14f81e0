//! Handshakes as firmware and libraries send them, byte for byte except for the key and the identity: all connect.

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::harness::{
    gateway::Gateway,
    raw::{ACCEPT, KEY, ask},
};

/// A head, and the sub-protocol to confirm. `{host}`, `{key}`, `{basic}`, `{bearer}` and `{id}` are filled in.
struct Handshake {
    client: &'static str,
    head: &'static str,
    protocol: Option<&'static str>,
}

const HANDSHAKES: [Handshake; 10] = [
    Handshake {
        client: "ESP-IDF, esp_websocket_client",
        head: "GET /v1/connect HTTP/1.1\r\nConnection: Upgrade\r\nHost: {host}\r\nUser-Agent: ESP32 Websocket Client\r\n\
               Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nAuthorization: Basic {basic}\r\n\r\n",
        protocol: None,
    },
    Handshake {
        client: "ESP-IDF with a sub-protocol and headers of its own",
        head: "GET /v1/connect HTTP/1.1\r\nConnection: Upgrade\r\nHost: {host}\r\nUser-Agent: ESP32 Websocket Client\r\n\
               Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: seawall.v1\r\n\
               Authorization: Bearer {bearer}\r\nSeawall-Device: {id}\r\nSeawall-Firmware: 3.8.0-b2\r\n\r\n",
        protocol: Some("seawall.v1"),
    },
    Handshake {
        client: "arduinoWebSockets",
        head: "GET /v1/connect?device={id}&firmware=3.8.0 HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
               Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: arduino\r\nOrigin: file://\r\n\
               User-Agent: arduino-WebSocket-Client\r\nAuthorization: Basic {basic}\r\n\r\n",
        protocol: Some("arduino"),
    },
    Handshake {
        client: "libwebsockets",
        head: "GET /v1/connect HTTP/1.1\r\nPragma: no-cache\r\nCache-Control: no-cache\r\nHost: {host}\r\nUpgrade: websocket\r\n\
               Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: lws-minimal, other\r\n\
               Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover; client_max_window_bits\r\n\
               Sec-WebSocket-Version: 13\r\nOrigin: http://{host}\r\nAuthorization: Basic {basic}\r\n\r\n",
        protocol: Some("lws-minimal"),
    },
    Handshake {
        client: "Python websockets",
        head: "GET /v1/connect HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n\
               Sec-WebSocket-Version: 13\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\
               Authorization: Basic {basic}\r\nUser-Agent: Python/3.11 websockets/13.1\r\n\r\n",
        protocol: None,
    },
    Handshake {
        client: "npm ws",
        head: "GET /v1/connect HTTP/1.1\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nConnection: Upgrade\r\n\
               Upgrade: websocket\r\nAuthorization: Basic {basic}\r\n\
               Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nHost: {host}\r\n\r\n",
        protocol: None,
    },
    Handshake {
        client: "gorilla/websocket",
        head: "GET /v1/connect HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Go-http-client/1.1\r\nAuthorization: Basic {basic}\r\n\
               Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Version: 13\r\n\
               Upgrade: websocket\r\n\r\n",
        protocol: Some("mqtt"),
    },
    Handshake {
        client: "Chromium",
        head: "GET /v1/connect HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nPragma: no-cache\r\nCache-Control: no-cache\r\n\
               Authorization: Basic {basic}\r\n\
               User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36\r\n\
               Upgrade: websocket\r\nOrigin: https://console.example\r\nSec-WebSocket-Version: 13\r\n\
               Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9\r\nSec-WebSocket-Key: {key}\r\n\
               Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nSec-WebSocket-Protocol: seawall.v1\r\n\r\n",
        protocol: Some("seawall.v1"),
    },
    Handshake {
        client: "Firefox",
        head: "GET /v1/connect HTTP/1.1\r\nHost: {host}\r\n\
               User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\nAccept: */*\r\n\
               Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nSec-WebSocket-Version: 13\r\n\
               Origin: null\r\nSec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Key: {key}\r\n\
               Authorization: Basic {basic}\r\nConnection: keep-alive, Upgrade\r\nSec-Fetch-Dest: empty\r\nSec-Fetch-Mode: websocket\r\n\
               Sec-Fetch-Site: cross-site\r\nPragma: no-cache\r\nCache-Control: no-cache\r\nUpgrade: websocket\r\n\r\n",
        protocol: None,
    },
    Handshake {
        client: "tokio-tungstenite",
        head: "GET /v1/connect HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
               Sec-WebSocket-Key: {key}\r\nauthorization: Bearer {bearer}\r\nseawall-device: {id}\r\n\r\n",
        protocol: None,
    },
];

#[tokio::test]
async fn handshakes_of_field_firmware_and_libraries_connect() {
    let gateway = Gateway::start("").await;
    for Handshake { client, head, protocol } in HANDSHAKES {
        let (id, secret) = gateway.device().await;
        let bytes = head
            .replace("{host}", &gateway.devices.to_string())
            .replace("{key}", KEY)
            .replace("{basic}", &STANDARD.encode(format!("{id}:{secret}")))
            .replace("{bearer}", &secret)
            .replace("{id}", &id);

        let answer = ask(gateway.devices, bytes.as_bytes()).await;

        assert_eq!(answer.status, 101, "{client}: {answer:?}");
        assert_eq!(answer.header("Sec-WebSocket-Accept"), Some(ACCEPT), "{client}");
        assert_eq!(answer.header("Sec-WebSocket-Protocol"), protocol, "{client}");
        // None is supported, so none may be confirmed (RFC 6455 §9.1).
        assert_eq!(answer.header("Sec-WebSocket-Extensions"), None, "{client}");
    }
}
