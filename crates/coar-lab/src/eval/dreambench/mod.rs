//! DreamBench as the DreamBooth paper runs it (arXiv 2208.12242, section 4.1): a concept for each subject, images of
//! every prompt, subject fidelity by DINO and CLIP-I, prompt fidelity by CLIP-T. `docs/dreambench.md` has the protocol.

mod folder;
mod html;
mod judging;
mod layout;
mod metric;
mod networks;
mod plan;
mod report;
mod run;

pub use folder::{OutFolder, Settings, TrainingRecord};
pub use judging::{Embeddings, JudgeFacts, Judges, score};
pub use layout::{Catalogue, DataFolder, Subject};
pub use metric::{Fidelity, Scores, against_references, among_references, mean, to_text};
pub use networks::Networks;
pub use plan::{Choice, Plan, Unit, numbers};
pub use report::{DrawnPicture, Results, SubjectResults, warnings, write_all};
pub use run::{Progress, RunOptions, run, settings};
