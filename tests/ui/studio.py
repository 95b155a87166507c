"""The whole flow of the page, as a visitor does it: register, watch, draw, compare, draw again, delete."""

import argparse
import base64
import contextlib
import re

from playwright.sync_api import expect, sync_playwright

from page import PATIENCE_MS, ROOT, SHOTS, Visit, close, launch, running

DESKTOP, PHONE, NARROW = (1280, 900), (390, 844), (320, 640)
expect.set_options(timeout=PATIENCE_MS)
STEPS = "6"


def pictures(name):
    return sorted((ROOT / "concepts" / name).glob("*.png"))


def go(page, section):
    page.get_by_role("navigation", name="Sections").get_by_role("link", name=section).click()
    expect(page.get_by_role("heading", level=1, name=section)).to_be_visible()


def settings(page):
    """The form of the Create view; hidden views have fields with the same names."""
    return page.locator("#create-form")


def drop(page, files):
    """Drags files over the form and drops them; the page must prevent the browser's default action."""
    given = [{"name": file.name, "type": kind, "bytes": base64.b64encode(file.read_bytes()).decode()} for file, kind in files]
    dragged = page.evaluate_handle(
        """(files) => {
            const dragged = new DataTransfer();
            for (const { name, type, bytes } of files) {
                dragged.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }));
            }
            return dragged;
        }""",
        given,
    )
    zone = page.locator("#drop")
    over = re.compile(r"\bover\b")
    zone.dispatch_event("dragenter", {"dataTransfer": dragged})
    expect(zone).to_have_class(over)
    zone.dispatch_event("dragleave", {"dataTransfer": dragged})
    expect(zone).not_to_have_class(over)
    for event in ["dragover", "drop"]:
        taken = zone.evaluate(
            """(zone, [type, dataTransfer]) =>
                !zone.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }))""",
            [event, dragged],
        )
        assert taken, f"{event} is left to the browser"
    expect(zone).not_to_have_class(over)


def register(visit, name):
    """Images, a caption, one image too many; the API's error beside the field; then a valid registration."""
    page = visit.page
    page.goto("/")
    expect(page).to_have_title("Create · coar Studio")
    visit.shot("create-empty")
    go(page, "Concepts")
    page.get_by_role("link", name="New concept").click()
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    drop(page, [(pictures("rex")[0], "image/png"), (ROOT / "README.md", "text/markdown")])
    expect(page.get_by_role("list", name="Chosen images").get_by_role("listitem")).to_have_count(1)
    expect(page.locator("#images-error")).to_contain_text("Only PNG, JPEG and WebP")
    visit.shot("dropped")
    page.locator("#pictures").set_input_files([*pictures("rex")[1:], pictures("finn")[0]])
    expect(page.locator("#images-error")).to_be_empty()
    chosen = page.get_by_role("list", name="Chosen images").get_by_role("listitem")
    expect(chosen).to_have_count(len(pictures("rex")) + 1)
    chosen.last.get_by_role("button").click()
    expect(chosen).to_have_count(len(pictures("rex")))
    chosen.nth(2).get_by_role("textbox").fill("on the beach")
    page.get_by_label("Class noun").fill("cat")
    page.get_by_text("Training settings").click()
    page.get_by_label("Steps").fill(STEPS)
    page.get_by_label("Name", exact=True).fill("Rex the Cat")
    with visit.faults.expecting(r"400: POST .*/v1/concepts$"):
        page.get_by_role("button", name="Start the training").click()
        field = page.get_by_label("Name", exact=True)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        expect(page.locator("#name-error")).to_contain_text("a-z, 0-9")
    visit.shot("register")
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name="Start the training").click()


def watch(visit, name):
    """Follows the training to its end: progress bar, curve, previews; then the versions."""
    page = visit.page
    expect(page.get_by_role("heading", level=1, name=name)).to_be_visible()
    panel = page.get_by_role("region", name="Training", exact=True)
    expect(panel.get_by_role("progressbar")).to_be_visible()
    expect(panel.locator(".state")).to_contain_text(f"of {STEPS}")
    visit.shot("training")
    expect(panel.locator(".state")).to_contain_text("Trained")
    expect(panel.get_by_role("img", name=re.compile(rf"Loss curve: .* at step {STEPS}\."))).to_be_visible()
    expect(panel.locator(".curve path.raw")).to_have_count(1)
    expect(page.locator("#concept-facts .badge")).to_have_text("Ready")
    expect(page.get_by_role("region", name="Versions").get_by_role("listitem")).to_have_count(1)
    references = page.get_by_role("region", name="Reference images").get_by_role("img")
    expect(references).to_have_count(len(pictures("rex")))
    visit.pictures_are_there("#concept-body img")
    visit.shot("concept")


def retrain_and_go_back(visit):
    """Trains a second version, then selects the first one again."""
    page = visit.page
    form = page.get_by_role("form", name="Train a new version")
    form.get_by_label("Steps").fill(STEPS)
    form.get_by_label("Seed").fill("1")
    form.get_by_role("button").click()
    versions = page.get_by_role("region", name="Versions")
    expect(versions.get_by_role("listitem")).to_have_count(2)
    expect(page.locator("#concept-facts")).to_contain_text("version 2")
    versions.get_by_role("button", name="Use this version: 1").click()
    expect(page.locator("#concept-facts")).to_contain_text("version 1")


def prompt_with_completion(visit, name):
    """Types the prompt and selects the concept with the keyboard."""
    page = visit.page
    go(page, "Create")
    area = settings(page).get_by_label("Prompt", exact=True)
    area.click()
    area.fill("")
    area.press_sequentially("a photo of <" + name[0])
    options = page.get_by_role("listbox", name="Concepts").get_by_role("option")
    expect(options.filter(has_text=re.compile(f"^.?{name}"))).to_be_visible()
    active = page.locator(f"#prompt-options [aria-selected=true]")
    expect(active).to_contain_text(name)
    expect(area).to_have_attribute("aria-activedescendant", re.compile("prompt-options-"))
    visit.shot("completion")
    area.press("Enter")
    expect(area).to_have_value(f"a photo of <{name}> cat")
    expect(options).to_have_count(0)
    area.press_sequentially(" on the beach")


def draw(visit, name):
    """Rejected settings are reported beside their field; then an image appears row by row."""
    page = visit.page
    page.get_by_text("Settings", exact=True).click()
    settings(page).get_by_label("Seed", exact=True).fill("7")
    settings(page).get_by_label("Images", exact=True).fill("2")
    settings(page).get_by_label("Temperature", exact=True).fill("9")
    with visit.faults.expecting(r"400: POST .*/v1/generations$"):
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator("#temperature-error")).to_contain_text("temperature")
        expect(settings(page).get_by_label("Temperature", exact=True)).to_be_focused()
    settings(page).get_by_label("Temperature", exact=True).fill("")
    # With the keyboard only.
    settings(page).get_by_label("Prompt", exact=True).press("Control+Enter")
    drawing = page.locator(".drawing").first
    expect(drawing.locator(".tile[data-partials]").first).to_be_visible(timeout=PATIENCE_MS)
    visit.shot("drawing")
    expect(drawing).to_have_attribute("data-status", "succeeded")
    tiles = drawing.locator(".tile[data-done][data-partials]")
    expect(tiles).to_have_count(2)
    expect(tiles.first).to_contain_text("seed 7 · image 0")
    expect(drawing.get_by_role("img", name=f"a photo of <{name}> cat on the beach")).to_have_count(2)
    visit.shot("drawn")


def cancel(visit):
    page = visit.page
    settings(page).get_by_label("Images", exact=True).fill("10")
    page.get_by_role("button", name="Draw", exact=True).click()
    drawing = page.locator(".drawing").first
    expect(drawing.locator(".state")).to_contain_text(re.compile("drawing|waiting for|before it"))
    drawing.get_by_role("button", name="Cancel").click()
    expect(drawing).to_have_attribute("data-status", "cancelled")


def compare(visit, name):
    """With and without the concept, side by side, with the same seed."""
    page = visit.page
    settings(page).get_by_label("Images", exact=True).fill("")
    settings(page).get_by_label("Compare with and without").check()
    page.get_by_role("button", name="Draw", exact=True).click()
    pair = page.locator(".pair").first
    for side, prompt in [(f"With <{name}>", f"a photo of <{name}> cat on the beach"), ("Without", "a photo of a cat on the beach")]:
        drawing = pair.get_by_role("article", name=side)
        expect(drawing).to_have_attribute("data-status", "succeeded")
        expect(drawing.locator(".prompt")).to_have_text(prompt)
        expect(drawing.locator(".tile")).to_contain_text("seed 7 · image 0")
    visit.shot("compared")


def gallery(visit, name):
    """All generated images are listed; one is enlarged, downloaded, reused with its settings, and deleted."""
    page = visit.page
    go(page, "Gallery")
    items = page.get_by_role("list", name="Generations").locator("> li")
    expect(items.filter(has_text=f"<{name}> cat on the beach").first).to_be_visible()
    expect(items.filter(has_text="Cancelled").filter(has_text=f"<{name}>")).to_have_count(1)
    visit.pictures_are_there("#gallery-list img")
    count = items.count()
    visit.shot("gallery")
    item = items.filter(has=page.locator(".shots:not(.one)")).first
    item.get_by_role("button", name=re.compile("^Image 1")).click()
    viewer = page.get_by_role("dialog", name="Image")
    expect(viewer).to_contain_text("Guidance")
    visit.shot("viewer")
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "coar-7-1.png"
    viewer.get_by_role("button", name="Again, same seed").click()
    expect(settings(page).get_by_label("Seed", exact=True)).to_have_value("7")
    expect(settings(page).get_by_label("First image", exact=True)).to_have_value("1")
    expect(settings(page).get_by_label("Prompt", exact=True)).to_have_value(f"a photo of <{name}> cat on the beach")
    page.get_by_role("button", name="Draw", exact=True).click()
    drawing = page.locator(".drawing").first
    expect(drawing).to_have_attribute("data-status", "succeeded")
    expect(drawing.locator(".tile")).to_contain_text("seed 7 · image 1")
    go(page, "Gallery")
    count += 1
    expect(items).to_have_count(count)
    items.first.get_by_role("button", name=re.compile("^Delete")).click()
    sheet = page.get_by_role("dialog", name="Delete these images?")
    expect(sheet.get_by_role("button", name="Keep")).to_be_focused()
    visit.shot("confirm")
    page.keyboard.press("Escape")
    expect(items).to_have_count(count)
    items.first.get_by_role("button", name=re.compile("^Delete")).click()
    sheet.get_by_role("button", name="Delete").click()
    expect(items).to_have_count(count - 1)


def rename_and_delete(visit, name):
    page = visit.page
    go(page, "Concepts")
    card = page.get_by_role("list", name="Concepts").get_by_role("link", name=name)
    expect(card).to_be_visible()
    visit.shot("concepts")
    card.click()
    form = page.get_by_role("form", name="Name and description")
    form.get_by_label("Name", exact=True).fill(f"{name}-2")
    form.get_by_label("Description").fill("our cat")
    form.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1, name=f"{name}-2")).to_be_visible()
    expect(page.locator("#concept-facts")).to_contain_text("our cat")
    page.get_by_role("button", name=f"Delete {name}-2").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", level=1, name="Concepts")).to_be_visible()
    expect(page.get_by_role("list", name="Concepts").get_by_role("link", name=f"{name}-2")).to_have_count(0)


def theme(visit):
    """The button cycles through system, light and dark, and the choice is kept."""
    page = visit.page
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    expect(button).to_contain_text("dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    expect(button).to_contain_text("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    button.click()


def keyboard(visit):
    """The first Tab focuses the skip link, and every view moves the focus to its title."""
    page = visit.page
    page.goto("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    go(page, "Gallery")
    expect(page.get_by_role("heading", level=1, name="Gallery")).to_be_focused()


def whole_flow(visit, name, thorough):
    register(visit, name)
    watch(visit, name)
    if thorough:
        retrain_and_go_back(visit)
    prompt_with_completion(visit, name)
    draw(visit, name)
    cancel(visit)
    compare(visit, name)
    gallery(visit, name)
    if thorough:
        theme(visit)
        keyboard(visit)


def look_around(visit, name):
    """Visits every view in colour schemes and widths that the flow has not covered."""
    page = visit.page
    page.goto("/")
    expect(page.get_by_label(f"Put <{name}> into the prompt")).to_be_visible()
    visit.shot("create")
    for section in ["Concepts", "Gallery"]:
        go(page, section)
        expect(page.locator("main li:visible").first).to_be_visible()
        visit.pictures_are_there(".view:not([hidden]) img")
        visit.shot(section.lower())
    page.goto("/#/concepts/new")
    visit.shot("register")
    page.goto(f"/#/concepts/{name}")
    expect(page.get_by_role("region", name="Versions")).to_be_visible()
    visit.pictures_are_there("#concept-body img")
    visit.shot("concept")
    page.get_by_role("button", name="API key").click()
    visit.shot("key")


def ask_for_a_key(visit, url):
    """A server with keys: the page asks for one, rejects a wrong one, accepts the right one, and forgets it."""
    page = visit.page
    secret = close(url)
    dialog = page.get_by_role("dialog", name="API key")
    with visit.faults.expecting(r"401: GET "):
        page.goto("/#/concepts")
        expect(dialog).to_contain_text("This server asks for a key")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        visit.shot("asked")
        dialog.get_by_label("Key", exact=True).fill("coar_wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog).to_contain_text("does not know this key")
        expect(dialog.get_by_label("Key", exact=True)).to_be_empty()
        dialog.get_by_label("Key", exact=True).fill(secret)
        dialog.get_by_label("Key", exact=True).press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#concept-list > li").first).to_be_visible()
    button = page.get_by_role("button", name="API key")
    expect(button).to_have_text("API key: set")
    page.reload()
    expect(page.locator("#concept-list > li").first).to_be_visible()
    expect(dialog).to_be_hidden()
    with visit.faults.expecting(r"401: GET "):
        button.click()
        dialog.get_by_role("button", name="Forget it").click()
        # Nothing that required the key is shown any more, and the page asks for a key again.
        expect(dialog).to_contain_text("This server asks for a key")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        expect(button).to_have_text("API key")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", required=True)
    parser.add_argument("--server", help="the built program")
    parser.add_argument("--url", help="a server that runs already")
    options = parser.parse_args()
    SHOTS.mkdir(parents=True, exist_ok=True)
    for old in SHOTS.glob("*.png"):
        old.unlink()
    server = contextlib.nullcontext(options.url) if options.url else running(options.server)
    with server as url, sync_playwright() as playwright:
        browser = launch(playwright, options.chromium)
        visits = []

        def visit(name, size, colours):
            visits.append(Visit(browser, url, name, size, colours))
            return visits[-1]

        try:
            desktop = visit("desktop-light", DESKTOP, "light")
            whole_flow(desktop, "rex", thorough=True)
            phone = visit("phone-dark", PHONE, "dark")
            whole_flow(phone, "rolf", thorough=False)
            look_around(visit("desktop-dark", DESKTOP, "dark"), "rex")
            look_around(visit("phone-light", PHONE, "light"), "rex")
            look_around(visit("narrow-light", NARROW, "light"), "rex")
            rename_and_delete(desktop, "rex")
            rename_and_delete(phone, "rolf")
            if options.url is None:
                ask_for_a_key(visit("key-light", DESKTOP, "light"), url)
        finally:
            # Also printed if a step has failed, because the console often shows the reason.
            faults = [f"{one.name}: {fault}" for one in visits for fault in one.faults.found]
            print("\n".join(faults))
            browser.close()
        assert not faults, f"{len(faults)} faults"
    print(f"the page passes; {len(list(SHOTS.glob('*.png')))} screenshots in {SHOTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
