def space_files(model_id):
    raise NotImplementedError
