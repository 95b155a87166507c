//! The real server as a process, real images, and a client.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::multipart::{Form, Part};
use serde_json::Value;

/// Timeout of all waits, for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A server on a free port with a data folder of its own.
pub struct TestApp {
    child: Child,
    pub url: String,
    pub dir: tempfile::TempDir,
    pub client: reqwest::Client,
    /// Flags in addition to the usual ones.
    flags: Vec<String>,
    /// Variables in addition to this process's own.
    variables: Vec<(String, String)>,
    /// Log level of `server.log` in the folder.
    level: &'static str,
    /// Sent as `Authorization: Bearer` if set.
    pub key: Option<String>,
}

fn launch(dir: &std::path::Path, flags: &[String], variables: &[(String, String)], level: &str) -> (Child, String) {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("server.log"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--threads",
            "2",
            "--device",
            "cpu",
            "--data",
        ])
        .arg(dir.join("data"))
        .args(flags)
        .envs(variables.iter().cloned())
        .stdout(Stdio::piped())
        .env("COAR_LOG", level)
        .stderr(log.expect("the folder can be written"))
        .spawn()
        .expect("the server starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("its output is piped"))
        .read_line(&mut line)
        .expect("it prints its address");
    let url = line
        .trim()
        .strip_prefix("listening on ")
        .unwrap_or_else(|| panic!("no address in `{line}`"))
        .to_owned();
    (child, url)
}

impl TestApp {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts a server with more flags.
    pub async fn start_with(flags: &[&str]) -> Self {
        Self::start_logging("warn", flags).await
    }

    /// Starts a server with more flags and a log level.
    pub async fn start_logging(level: &'static str, flags: &[&str]) -> Self {
        Self::start_in(level, flags, &[]).await
    }

    /// Starts a server with a log level, more flags and variables.
    pub async fn start_in(level: &'static str, flags: &[&str], variables: &[(&str, String)]) -> Self {
        coar::client::install_tls();
        let dir = tempfile::tempdir().unwrap();
        let flags: Vec<_> = flags.iter().map(ToString::to_string).collect();
        let variables: Vec<_> = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        let (child, url) = launch(dir.path(), &flags, &variables, level);
        let app = Self {
            child,
            url,
            dir,
            client: reqwest::Client::new(),
            flags,
            variables,
            level,
            key: None,
        };
        app.until_ready().await;
        app
    }

    async fn until_ready(&self) {
        self.until("ready", || async {
            let answer = self.client.get(format!("{}/readyz", self.url)).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
    }

    /// Polls until `look` returns a value.
    pub async fn until<T, F: Future<Output = Option<T>>>(&self, what: &str, mut look: impl FnMut() -> F) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{what} did not happen in time");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The process id of the server.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn kill_nine_and_restart(&mut self) {
        self.child.kill().expect("SIGKILL is delivered");
        self.child.wait().unwrap();
        (self.child, self.url) = launch(self.dir.path(), &self.flags, &self.variables, self.level);
        self.until_ready().await;
    }

    /// Sends SIGTERM, waits for the end, and starts again; returns whether the exit was clean.
    pub async fn terminate_and_restart(&mut self) -> bool {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let clean = self.child.wait().unwrap().success();
        (self.child, self.url) = launch(self.dir.path(), &self.flags, &self.variables, self.level);
        self.until_ready().await;
        clean
    }

    /// Sends SIGTERM and waits for the end; returns the log.
    pub fn terminate_and_read_log(&mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap();
        std::fs::read_to_string(self.dir.path().join("server.log")).unwrap()
    }

    /// Peak memory of the server, in bytes.
    pub fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// A request with the key, if one is set.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.url));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Creates a key with `coar keys create` while the server runs, and waits until the server requires one.
    pub async fn create_key(&self, tenant: &str, scopes: &str) -> String {
        let key = self.coar(&["keys", "create", "--tenant", tenant, "--scopes", scopes]);
        self.until("the closed door", || async {
            let answer = self.client.get(format!("{}/v1/models", self.url)).send().await.ok()?;
            (answer.status() == 401).then_some(())
        })
        .await;
        key.trim().to_owned()
    }

    /// Runs a command of the program on this server's data folder; returns its output.
    pub fn coar(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_coar"))
            .args(arguments)
            .arg("--data")
            .arg(self.dir.path().join("data"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        answer(self.request(reqwest::Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        answer(self.request(reqwest::Method::POST, path).json(&body)).await
    }

    pub async fn delete(&self, path: &str) -> u16 {
        self.request(reqwest::Method::DELETE, path)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    }

    pub async fn register(&self, form: Form) -> (u16, Value) {
        answer(self.request(reqwest::Method::POST, "/v1/concepts").multipart(form)).await
    }

    /// Registers a held-out subject with a short training; returns the training's id.
    pub async fn register_subject(&self, subject: &SampleSubject, steps: u32) -> String {
        let form = subject_form(subject).text("steps", steps.to_string());
        let (status, body) = self.register(form).await;
        assert_eq!(status, 202, "{body}");
        body["training"]["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a training has ended.
    pub async fn until_ended(&self, training: &str) -> Value {
        self.until("the training's end", || async {
            let (_, body) = self.get(&format!("/v1/trainings/{training}")).await;
            let ended = !["queued", "running"].contains(&body["status"].as_str().unwrap_or(""));
            ended.then_some(body)
        })
        .await
    }

    /// Files of the blob store.
    pub fn blobs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for folder in std::fs::read_dir(self.dir.path().join("data/blobs")).unwrap() {
            let folder = folder.unwrap().path();
            if folder.is_dir() {
                found.extend(std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
        found
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.expect("the server answers");
    let status = answer.status().as_u16();
    let text = answer.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A subject of `concepts/`.
#[derive(Debug)]
pub struct SampleSubject {
    pub name: &'static str,
    pub class: &'static str,
}

/// A cat.
pub const REX: SampleSubject = SampleSubject {
    name: "rex",
    class: "cat",
};

/// A dog.
pub const SPOT: SampleSubject = SampleSubject {
    name: "spot",
    class: "dog",
};

/// The first `count` reference images of a subject: PNG files.
pub fn images(subject: &SampleSubject, count: usize) -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("concepts");
    (1..=count)
        .map(|number| std::fs::read(folder.join(format!("{}/{number}.png", subject.name))).unwrap())
        .collect()
}

pub fn image_part(bytes: Vec<u8>) -> Part {
    Part::bytes(bytes).file_name("image.png")
}

/// A registration of a subject with three images.
pub fn subject_form(subject: &SampleSubject) -> Form {
    form_named(subject, subject.name)
}

/// The same under another name.
pub fn form_named(subject: &SampleSubject, name: &'static str) -> Form {
    let form = Form::new()
        .text("name", name)
        .text("kind", "subject")
        .text("class", subject.class);
    images(subject, 3)
        .into_iter()
        .fold(form, |form, bytes| form.part("images", image_part(bytes)))
}

/// Server-sent events of a response, as they arrive.
pub struct Events {
    answer: reqwest::Response,
    text: String,
}

impl Events {
    pub async fn open(request: reqwest::RequestBuilder) -> Self {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self {
            answer,
            text: String::new(),
        }
    }

    /// The next event's name and data; `None` at the end of the stream. Comments are skipped.
    pub async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let event: String = self.text.drain(..end + 2).collect();
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
                if let (Some(name), Some(data)) = (field("event: "), field("data: ")) {
                    return Some((name.to_owned(), serde_json::from_str(data).unwrap()));
                }
                continue;
            }
            let piece = tokio::time::timeout(PATIENCE, self.answer.chunk());
            let piece = piece.await.expect("the stream continues").unwrap()?;
            self.text
                .push_str(std::str::from_utf8(&piece).expect("a piece may end anywhere, but this JSON is ASCII"));
        }
    }
}
