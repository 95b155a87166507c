//! Commands that talk to a server.

pub(super) mod concept;
pub(super) mod format;
pub(super) mod generate;
pub(super) mod training;

use clap::Args;

use super::local::block_on;
use crate::client::Client;

/// Which server, and with which key.
#[derive(Debug, Clone, Args)]
pub(super) struct RemoteArgs {
    /// Address of a server, which the commands concept, training, generate, train and models then use instead of
    /// --data.
    #[arg(
        id = "server_url",
        long = "server",
        global = true,
        help_heading = "Options of every command",
        env = "COAR_SERVER",
        value_name = "URL"
    )]
    server: Option<String>,
    /// API key for --server.
    #[arg(
        id = "api_key",
        long = "key",
        global = true,
        help_heading = "Options of every command",
        env = "COAR_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    key: Option<String>,
}

impl RemoteArgs {
    /// The server's client; `None` if no server is given.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub(super) fn client(&self) -> anyhow::Result<Option<Client>> {
        // An empty variable counts as unset.
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        given(&self.server)
            .map(|server| Ok(Client::new(&server, given(&self.key))?))
            .transpose()
    }
}

/// The server, for a command that works only with one.
pub(super) fn needed(server: Option<&Client>) -> anyhow::Result<&Client> {
    server.ok_or_else(|| anyhow::anyhow!("this needs a server: name it with --server URL or COAR_SERVER"))
}

/// `coar models`
pub(super) fn models(server: Option<&Client>) -> anyhow::Result<()> {
    let client = needed(server)?;
    block_on(async {
        for model in client.models().await? {
            println!("{}", format::text(&model["id"]));
        }
        Ok(())
    })
}
